"""Which runs an analysis consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bivlm_edge.config import PRUNE_MODES
from bivlm_edge.errors import RequestError
from bivlm_edge.pruning import tokens_to_keep

FULL, NO_IMAGE, SHUFFLED = "full", "no image", "shuffled"
TEXT, RARE_TEXT = "question tokens", "rarest question tokens"
RANDOM = "random"
BASELINES = (RANDOM, "uniform")  # what a selector has to beat


@dataclass(frozen=True, slots=True)
class Run:
    """All questions once.

    Attributes:
        selector: FULL, NO_IMAGE, SHUFFLED (another picture, whole), TEXT (the picture whole, but
            question tokens dropped at random), RARE_TEXT (those that most questions have dropped
            first) or a mode of TokenPrune.
        kept: Image tokens that reach the decoder; of TEXT and RARE_TEXT, the image tokens whose
            share of all is the share of question tokens that stay.
        seed: Of SHUFFLED, TEXT and `random`; the others are the same for all seeds.
    """

    selector: str
    kept: int
    seed: int = 0

    @property
    def name(self) -> str:
        """For people and file names."""
        seeded = f" seed {self.seed}" if self.selector in (SHUFFLED, TEXT, RANDOM) else ""
        return f"{self.selector} {self.kept}{seeded}"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of an analysis.

    Attributes:
        modes: Selectors to compare, in order.
        seeds: Runs of `random` per number of tokens.
        tolerance: Loss of accuracy that passes, 0 < tolerance < 1.
        seed: Of shuffled pictures, dropped question tokens and resampling; `random` has the seeds
            from this one on.
        also: Numbers of tokens to test beside the halves of all of them.
        searches: Whether halves are tested and the smallest number that is enough is sought;
            otherwise the numbers of `also` alone, all tokens and none.
    """

    modes: tuple[str, ...]
    seeds: int = 5
    tolerance: float = 0.01
    seed: int = 0
    also: tuple[int, ...] = ()
    searches: bool = True

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in PRUNE_MODES:
                raise RequestError(
                    f"--modes {mode!r} is not known. Accepted: {', '.join(PRUNE_MODES)}."
                )
        if not self.modes:
            raise RequestError(f"--modes names none of {', '.join(PRUNE_MODES)}. Give one or more.")
        if self.seeds < 1:
            raise RequestError(f"--seeds {self.seeds} leaves no run of random. Give 1 or more.")
        if not 0 < self.tolerance < 1:
            raise RequestError(
                f"--tolerance {100 * self.tolerance:g} is not between 0 and 100 points of accuracy."
            )
        if not (self.searches or self.also):
            raise RequestError("--no-search tests the numbers of --tokens alone. Give one or more.")

    def runs(self, mode: str, kept: int) -> list[Run]:
        """Return the runs of a mode, TEXT or RARE_TEXT at a number of tokens."""
        if mode == RANDOM:
            return [Run(mode, kept, self.seed + number) for number in range(self.seeds)]
        return [Run(mode, kept, self.seed if mode == TEXT else 0)]

    def grid(self, image_tokens: int) -> list[int]:
        """Return the numbers of tokens that every selector is tested at: falling, all to 0.

        A search has a tenth of all tokens among them, where selectors are told apart.

        Raises:
            RequestError: One of `also` is not below `image_tokens`.
        """
        whole = grid(image_tokens, self.also)
        if self.searches:
            return sorted({*whole, tenth(image_tokens)}, reverse=True)
        return [kept for kept in whole if kept in (image_tokens, 0, *self.also)]


def tenth(image_tokens: int) -> int:
    """Return a tenth of the tokens, rounded up as TokenPrune does."""
    return tokens_to_keep(0.1, image_tokens)


def grid(image_tokens: int, also: Sequence[int] = ()) -> list[int]:
    """Return all tokens, a half, a quarter ... 1, 0, and `also`: falling.

    Raises:
        RequestError: One of `also` is not below `image_tokens`.
    """
    found = {0, *also}
    for kept in also:
        if not 0 <= kept < image_tokens:
            raise RequestError(
                f"--tokens {kept} is not below the {image_tokens} tokens of an image of this model."
            )
    while image_tokens > 0:
        found.add(image_tokens)
        image_tokens //= 2
    return sorted(found, reverse=True)
