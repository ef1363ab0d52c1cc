import torch

from mergewell.methods.pcb import Pcb
from mergewell.tensor_group import TensorGroup


def reference(taus: torch.Tensor, *, density: float, clamp: float, scale: float) -> torch.Tensor:
    """The paper's algorithm on [K, D], with sorts of everything."""
    count, size = taus.shape

    def at(values: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        ordered = values.sort(1).values
        return ordered[:, low : low + 1], ordered[:, high : high + 1]

    low, high = at(taus.abs(), int(size * clamp), int(size * (1 - clamp)) - 1)
    magnitude = taus.abs().clamp(low, high)
    intra = torch.exp(count * ((magnitude - low) / (high - low)) ** 2)
    score = intra * torch.tanh(taus * taus.sum(0))
    low, high = at(score, int(size * (1 - density)), size - 1)
    weight = (score.clamp(low, high) - low) / (high - low)
    merged = (weight * taus.sign() * magnitude).sum(0) / weight.sum(0).clamp(min=1e-12)
    return scale * merged


def group(name: str, taus: torch.Tensor) -> TensorGroup:
    base = torch.zeros_like(taus[0])
    return TensorGroup(name, tuple(taus), torch.ones(len(taus), dtype=taus.dtype), base)


def test_worked_example() -> None:
    # magnitudes 0, 1, 2; scores 0, exp(2/4) tanh(2), exp(2) tanh(4) and the same of the second:
    # at density 0.5 the lower threshold is the middle one: only the last entry keeps a weight
    taus = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    merged = Pcb(density=0.5, clamp=0.0, scale=1.0, scope="tensor").merge(group("w", taus))
    assert merged.tolist() == [0.0, 0.0, 2.0]


def test_is_the_algorithm_of_the_paper_over_the_whole_model() -> None:
    torch.manual_seed(0)
    taus = torch.randn(3, 3000, dtype=torch.float32).double()
    groups = [group("a", taus[:, :1000]), group("b", taus[:, 1000:])]
    method = Pcb(density=0.1, clamp=0.01)
    (statistic,) = method.statistics()
    values = statistic.measure(groups)
    merged = [
        method.merge(
            TensorGroup(
                g.name, g.experts, g.coefficients, g.base, statistics={statistic: values[g.name]}
            )
        )
        for g in groups
    ]
    expected = reference(taus, density=0.1, clamp=0.01, scale=1.2)
    got = torch.cat(merged)
    # thresholds are float32: an entry just beyond one may keep a weight of 1e-7
    near = (got - expected).abs() <= 1e-5 * expected.abs().max()
    assert near.double().mean() > 0.999
    assert 0 < int((got != 0).sum()) < 1000


def test_one_scope_and_the_other_agree_on_one_tensor() -> None:
    torch.manual_seed(1)
    tensors = group("w", torch.randn(2, 500))
    method = Pcb()
    (statistic,) = method.statistics()
    value = statistic.measure([tensors])["w"]
    known = TensorGroup(
        "w", tensors.experts, tensors.coefficients, tensors.base, statistics={statistic: value}
    )
    assert torch.equal(method.merge(known), Pcb(scope="tensor").merge(tensors))
