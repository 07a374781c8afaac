"""The commands: arguments to one function call each, results and errors to text."""
