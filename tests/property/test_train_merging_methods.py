"""Each method of merging is its formula, written down a second time in float64, however the positions are cut into blocks."""

import numpy as np
import pytest
import torch
from fuseline.train.merging.config import MergeConfig
from fuseline.train.merging.methods import rule_of
from fuseline.train.merging.rule import Block
from fuseline.train.merging.selection import find_cuts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=60, deadline=None)
# Few values, so that positions tie, cancel and stay where they were.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.25, 3.0, 1e-3, -7e-4])


@st.composite
def tensors(draw, least_models: int = 1):
    """Base (N,), models (M, N) in float64, and where blocks end."""
    n, m = draw(st.integers(1, 24)), draw(st.integers(least_models, 4))
    values = st.lists(VALUES, min_size=n, max_size=n)
    base = torch.tensor(draw(values), dtype=torch.float64)
    models = base + torch.tensor([draw(values) for _ in range(m)], dtype=torch.float64)
    ends = sorted(draw(st.sets(st.integers(1, n // 2)))) if n > 1 else []
    return base, models, [*(2 * end for end in ends), n]  # blocks have even lengths, but the last


def merged(config: MergeConfig, base: torch.Tensor, models: torch.Tensor, ends=None, names=None, tensor="w"):
    ends = ends or [len(base)]
    blocks = [Block(base[a:b], models[:, a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
    names = names or [f"m{i}" for i in range(len(models))]
    rule = rule_of(config, tensor=tensor, models=names, blocks=blocks, n_positions=len(base))
    return torch.cat([rule.apply(block) for block in blocks]), rule.weights


# ---- the formulas a second time, position by position ------------------------------------------------------------------------------------


def largest(scores: list[float], k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def disjoint(deltas, weights, votes, *, normalize, least=0.0):
    result = []
    for column in np.asarray(deltas).T:
        sign = 1 if sum(v * d for v, d in zip(votes, column, strict=True)) >= 0 else -1
        kept = [(w, d) for w, d in zip(weights, column, strict=True) if np.sign(w * d) == sign]
        divisor = sum(w for w, _ in kept) or 1.0
        total = sum(w * d for w, d in kept)
        result.append(total / max(divisor, least) if normalize and kept else total)
    return np.array(result)


def trimmed(delta, density):
    kept = largest([abs(d) for d in delta], max(1, int(density * len(delta))))
    return np.array([d if i in kept else 0.0 for i, d in enumerate(delta)])


def sce(base, models, density, variant):
    deltas = models - base
    variance = np.array([np.mean((column - column.mean()) ** 2) if len(set(column)) > 1 else 0.0 for column in deltas.T])
    kept = largest(list(variance), int(density * np.count_nonzero(variance))) if density < 1 else set(range(len(base)))
    masked = deltas * np.array([float(i in kept) for i in range(len(base))])
    squares = [np.mean(row**2) for row in masked]
    least = 1e-6 if variant == "mergekit" else 0.0
    uniform = sum(squares) < least or sum(squares) == 0
    weights = [1 / len(models)] * len(models) if uniform else [square / sum(squares) for square in squares]
    moving = masked if variant == "mergekit" else deltas
    return base + disjoint(moving, weights, [1.0] * len(weights), normalize=True, least=least), weights


WEIGHTS = {"m0": 0.5, "m1": 2.0, "m2": 1.5}


def weights_of(models) -> list[float]:
    return [WEIGHTS.get(f"m{i}", 1.0) for i in range(len(models))]


def close(found: torch.Tensor, expected) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


# ---- the methods --------------------------------------------------------------------------------------------------------------------


@given(found=tensors(), normalize=st.booleans())
@SETTINGS
def test_linear(found, normalize):
    base, models, ends = found
    weights = np.array(weights_of(models))
    result, _ = merged(MergeConfig(method="linear", weights=WEIGHTS, normalize=normalize), base, models, ends)
    close(result, weights @ models.numpy() / (weights.sum() if normalize else 1))


@given(found=tensors(), t=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@SETTINGS
def test_slerp(found, t):
    base, models, ends = found
    a, b = base.numpy(), models[0].numpy()
    norms = [norm if norm > 1e-8 else 1.0 for norm in (np.linalg.norm(a), np.linalg.norm(b))]
    cosine = a @ b / norms[0] / norms[1]
    if abs(cosine) > 0.9995:
        expected = (1 - t) * a + t * b
    else:
        angle = np.arccos(cosine)
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    result, _ = merged(MergeConfig(method="slerp", t=t), base, models[:1], ends)
    close(result, expected)


@given(found=tensors(), normalize=st.booleans(), scale=st.sampled_from([1.0, 0.3]))
@SETTINGS
def test_task_arithmetic(found, normalize, scale):
    base, models, ends = found
    weights = np.array(weights_of(models))
    config = MergeConfig(method="task_arithmetic", weights=WEIGHTS, normalize=normalize, scale=scale)
    result, _ = merged(config, base, models, ends)
    deltas = (models - base).numpy()
    close(result, base.numpy() + scale * (weights @ deltas) / (weights.sum() if normalize else 1))


@given(found=tensors(), density=st.sampled_from([0.1, 0.4, 0.5, 0.9, 1.0]), normalize=st.booleans(), scale=st.sampled_from([1.0, 0.5]))
@SETTINGS
def test_ties(found, density, normalize, scale):
    base, models, ends = found
    densities = {"m1": 0.75}
    config = MergeConfig(method="ties", density=density, densities=densities, weights=WEIGHTS, normalize=normalize, scale=scale)
    result, _ = merged(config, base, models, ends)
    kept = [trimmed(row, densities.get(f"m{i}", density)) for i, row in enumerate((models - base).numpy())]
    weights = weights_of(models)
    close(result, base.numpy() + scale * disjoint(kept, weights, weights, normalize=normalize))


@given(found=tensors(), normalize=st.booleans())
@SETTINGS
def test_dare_that_keeps_everything_is_task_arithmetic_or_ties(found, normalize):
    base, models, ends = found
    settings = {"weights": WEIGHTS, "normalize": normalize, "density": 1.0}
    for dare, other in (("dare_linear", "task_arithmetic"), ("dare_ties", "ties")):
        same = {key: value for key, value in settings.items() if key != "density" or other == "ties"}
        ours = merged(MergeConfig(method=dare, **settings), base, models, ends)[0]
        assert torch.equal(ours, merged(MergeConfig(method=other, **same), base, models, ends)[0])


@given(found=tensors(), density=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 2**62))
@SETTINGS
def test_dare_keeps_a_position_scaled_or_drops_it_whatever_the_blocks(found, density, seed):
    base, models, ends = found
    config = MergeConfig(method="dare_linear", density=density, seed=seed)
    result, _ = merged(config, base, models[:1], ends)
    assert torch.equal(result, merged(config, base, models[:1])[0])
    delta, change = (models[0] - base).numpy(), (result - base).numpy()
    assert np.all(np.isclose(change, 0, atol=1e-12) | np.isclose(change, delta / density, rtol=1e-9))


def test_dare_keeps_the_share_of_its_density_and_draws_again_for_each_seed_model_and_tensor():
    base, models = torch.zeros(100_000), torch.ones(2, 100_000)
    config = MergeConfig(method="dare_linear", density=0.3, seed=1)
    kept = [
        merged(config, base, models[:1], names=["a"])[0],
        merged(config, base, models[:1], names=["b"])[0],
        merged(config, base, models[:1], names=["a"], tensor="v")[0],
        merged(config.model_copy(update={"seed": 2}), base, models[:1], names=["a"])[0],
    ]
    for n, one in enumerate(kept):
        assert abs((one > 0).double().mean() - 0.3) < 0.01
        for other in kept[:n]:
            assert abs(((one > 0) & (other > 0)).double().mean() - 0.09) < 0.01  # independent of each other
    assert torch.equal(merged(config, base, models, names=["a", "b"])[0], kept[0] + kept[1])


@given(found=tensors(least_models=2))
@SETTINGS
def test_varm(found):
    base, models, ends = found
    deltas = (models - base).numpy()
    squares = (deltas**2).mean(axis=1)
    weights = squares / squares.sum() if squares.sum() else np.full(len(squares), 1 / len(squares))
    result, found_weights = merged(MergeConfig(method="varm"), base, models, ends)
    np.testing.assert_allclose(found_weights, weights, rtol=1e-12)
    close(result, base.numpy() + weights @ deltas)


@given(
    found=tensors(least_models=2),
    density=st.sampled_from([0.1, 0.4, 0.5, 1.0]),
    variant=st.sampled_from(["fuseai", "mergekit"]),
    scale=st.sampled_from([1.0, 2.0**-12]),
)
@SETTINGS
def test_sce(found, density, variant, scale):
    base, models, ends = found
    stretch = 1 + torch.arange(len(base), dtype=torch.float64) / 1024  # few variances are equal then
    models = base + (models - base) * scale * stretch  # the smaller fall below mergekit's threshold
    variances = sorted(torch.var(models - base, dim=0, correction=0).tolist(), reverse=True)
    k = int(density * sum(variance > 1e-20 for variance in variances))
    assume(density == 1 or k == 0 or variances[k - 1] - variances[k] > 1e-9 * variances[k - 1])  # else rounding decides which is selected
    expected, weights = sce(base.numpy(), models.numpy(), density, variant)
    result, found_weights = merged(MergeConfig(method="sce", density=density, variant=variant), base, models, ends)
    np.testing.assert_allclose(found_weights, weights, rtol=1e-9)
    close(result, expected)


# ---- what all have in common --------------------------------------------------------------------------------------------------------

ALL = [
    MergeConfig(method="linear"),
    MergeConfig(method="slerp", t=0.3),
    MergeConfig(method="task_arithmetic"),
    MergeConfig(method="ties"),
    MergeConfig(method="dare_linear"),
    MergeConfig(method="dare_ties"),
    MergeConfig(method="varm"),
    MergeConfig(method="sce"),
    MergeConfig(method="sce", variant="mergekit"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.method}-{config.variant}")
def test_models_that_did_not_move_give_the_base_to_the_bit(config, dtype):
    base = torch.randn(1001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    base[:3] = torch.tensor([0.0, -0.0, 1e-40])
    models = base.expand(config.most_models or 3, -1).clone()
    result, weights = merged(config, base, models, [400, 1001])
    assert result.dtype == dtype
    assert result.numpy().tobytes() == base.numpy().tobytes()
    assert len(weights) == len(models)


@pytest.mark.parametrize("config", [config for config in ALL if config.method in {"linear", "varm"}], ids=lambda config: config.method)
def test_a_model_merged_with_itself_is_that_model(config):
    base, model = torch.randn(2, 1001, generator=torch.Generator().manual_seed(1))
    result, _ = merged(config, base, model.expand(3, -1).clone())
    torch.testing.assert_close(result, model)


@given(found=tensors(least_models=2), variant=st.sampled_from(["fuseai", "mergekit"]))
@SETTINGS
def test_the_scale_of_the_task_vectors_scales_the_merge_as_in_fuseai_but_not_as_in_mergekit(found, variant):
    base, models, _ = found
    base, deltas = torch.zeros_like(base), models - base
    config = MergeConfig(method="sce", density=0.5, variant=variant)
    small = 2.0**-40
    if variant == "fuseai":
        torch.testing.assert_close(merged(config, base, deltas * small)[0] / small, merged(config, base, deltas)[0], rtol=1e-12, atol=0)
    else:
        assert merged(config, base, deltas * small)[1] == (1 / len(deltas),) * len(deltas)


@given(
    rows=st.lists(st.lists(st.floats(0, 3, width=32) | VALUES.map(abs), min_size=12, max_size=12), min_size=1, max_size=3),
    density=st.sampled_from([0.1, 0.3, 0.5, 0.99]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    nonzero=st.booleans(),
    cut=st.integers(1, 11),
)
@SETTINGS
def test_the_cut_selects_exactly_as_many_as_asked_for_and_the_first_of_equal_ones(rows, density, dtype, nonzero, cut):
    scores = torch.tensor(rows, dtype=dtype)
    blocks = [scores[:, :cut].contiguous(), scores[:, cut:].contiguous()]
    cuts = find_cuts(lambda: iter(blocks), densities=[density] * len(rows), nonzero=nonzero)
    for row, found in enumerate(cuts):
        values = scores[row].tolist()
        k = int(density * sum(value > 0 for value in values)) if nonzero else max(1, int(density * len(values)))
        select = found.selector()
        selected = torch.cat([select(block[row]) for block in blocks])
        assert set(torch.nonzero(selected).flatten().tolist()) == largest(values, k)
