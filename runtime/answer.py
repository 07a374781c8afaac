"""From a picture and a question to text: preprocessing, prompt and generation put together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from bivlm_edge.errors import BundleError
from bivlm_edge.pictures import open_picture
from bivlm_edge.runtime.generate import Generation
from bivlm_edge.runtime.preprocess import Picture, preprocess
from bivlm_edge.runtime.prompt import PromptBuilder
from bivlm_edge.runtime.sampling import Sampler, greedy
from bivlm_edge.runtime.session import VlmSession


class Answerer:
    """A loaded model with its tokenizer.

    Attributes:
        session: The graph.
        prompts: Text to token ids and back.
    """

    def __init__(self, session: VlmSession) -> None:
        """Read tokenizer and chat template of the session's bundle.

        Raises:
            BundleError: One is missing or malformed.
        """
        self.session = session
        self.prompts = PromptBuilder(session.paths, session.manifest)

    def picture(self, image: Path | str | Image.Image) -> Picture:
        """Return a preprocessed picture; many questions can share one.

        Raises:
            DataError: The file is missing or not a picture.
            BundleError: Manifest and preprocessing disagree.
        """
        opened = image if isinstance(image, Image.Image) else open_picture(image)
        manifest = self.session.manifest
        picture = preprocess(opened, manifest.image)
        if picture.pixels.shape[1:] != manifest.pixel_shape:
            raise BundleError(
                f"preprocessing gives images of {picture.pixels.shape[1:]}, the graph takes "
                f"{manifest.pixel_shape}: the manifest contradicts itself. Export again."
            )
        return picture

    def ask(
        self,
        question: str,
        picture: Picture | None = None,
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler = greedy,
    ) -> Generation:
        """Return the answer as tokens that are computed when asked for; see `text_of`.

        Raises:
            RequestError: The question is empty or too long, or max_new_tokens < 1.
        """
        return Generation(
            self.session,
            self.prompts.encode(question, picture),
            None if picture is None else picture.pixels,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
        )

    def text_of(self, generation: Generation) -> Iterator[str]:
        """Yield the text of an answer piece by piece."""
        return self.prompts.stream(generation)
