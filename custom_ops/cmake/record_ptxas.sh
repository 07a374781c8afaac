#!/bin/sh
# record_ptxas.sh nvcc .. -o OBJECT ..: compiles, and keeps what ptxas says about each kernel in
# OBJECT.ptxas instead of printing it.
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" -Xptxas -v 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' "$object.ptxas" >&2
exit $status
