"""Random weights in packed form: budget, scale, what layers of one input share; real sizes."""

from __future__ import annotations

import numpy as np
import pytest

from bivlm_edge.synthetic import NAMES
from bivlm_edge.synthetic.architectures import ARCHITECTURES
from bivlm_edge.synthetic.build import NoMemory
from bivlm_edge.synthetic.weights import (
    Budget,
    draw_transform,
    random_binary_weight,
    random_group_weight,
)

# In millions, as the model cards give them.
PUBLISHED_PARAMETERS = {
    "smolvlm-256m": 256,
    "smolvlm-500m": 507,
    "llava-ov-0.5b": 894,
    "qwen2.5-vl-3b": 3755,
    "llava-1.5-7b": 7063,
}


@pytest.mark.parametrize("name", NAMES)
def test_architecture_has_the_published_number_of_parameters(name: str) -> None:
    with NoMemory():
        module = ARCHITECTURES[name].module()
    found = sum(tensor.numel() for tensor in module.parameters()) / 1e6
    assert found == pytest.approx(PUBLISHED_PARAMETERS[name], abs=1)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_has_the_whole_vocabulary_and_the_real_special_tokens(name: str) -> None:
    architecture = ARCHITECTURES[name]
    tokenizer = architecture.tokenizer()
    assert len(tokenizer) == architecture.vocabulary
    for text, number in architecture.special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(text) == number
    assert tokenizer.decode(tokenizer("wo ist's?")["input_ids"]) == "wo ist's?"


@pytest.mark.parametrize("sizes", [[(576, 576), (1536, 576)] * 30, [(4304, 1152), (1152, 4304)]])
def test_budget_is_nearly_spent_and_never_exceeded(sizes: list[tuple[int, int]]) -> None:
    rng, budget, nbytes, weights = np.random.default_rng(0), Budget(2.0), 0, 0
    for n, k in sizes:
        planes = budget.spend([n, n], k)
        transform = draw_transform(rng, k, planes)
        nbytes += 2 * random_binary_weight(rng, n, transform).nbytes
        weights += 2 * n * k
        assert 8 * nbytes <= 2.0 * weights
    assert 8 * nbytes >= 1.99 * weights


def test_a_budget_below_one_plane_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"1 bits per weight do not hold layers of \[16\] x 64"):
        Budget(1.0).spend([16], 64)


@pytest.mark.parametrize(("n", "k", "block"), [(17, 300, 64), (64, 256, 128), (33, 64, 64)])
def test_binary_weight_keeps_the_scale_of_its_input(n: int, k: int, block: int) -> None:
    rng = np.random.default_rng(1)
    planes = Budget(3.0).spend([n], k)
    transform = draw_transform(rng, k, planes)
    first, second = (random_binary_weight(rng, rows, transform) for rows in (n, 8 * n))
    assert first.hadamard_block == block
    assert first.signs is second.signs
    assert first.order is second.order
    assert second.decode().std() == pytest.approx(k**-0.5, rel=0.1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_weight_keeps_the_scale_of_its_input(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(2)
    weight = random_group_weight(rng, 60, 300, bits=bits, group=32, symmetric=symmetric)
    assert weight.dequantize().std() == pytest.approx(300**-0.5, rel=0.1)
    assert bool((weight.zero == 2 ** (bits - 1)).all()) == symmetric
