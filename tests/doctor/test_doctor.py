"""The doctor: every planted fault is named, and healthy merges are left in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_toys
import pytest
import torch
from architectures import cnn
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergewell.cli.main import main
from mergewell.doctor.examinations.base import EXAMINATIONS
from mergewell.doctor.patient import Patient, shares_of
from mergewell.doctor.probe import Answers, Probe
from mergewell.doctor.visit import Visit, doctor
from mergewell.flags import recipe_from_flags
from mergewell.methods.magmax import Magmax
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.run import run

FILE = "model.safetensors"
TOKENS = ["<s>", "</s>", "a", "b"]
CNN = "architectures:cnn"


def recipe(base: Path, experts: list[Path], method: str, *settings: str, **more: Any) -> Recipe:
    return recipe_from_flags(
        base=str(base), experts=[f"{e}:1" for e in experts], method=method,
        settings=list(settings), **more,
    )  # fmt: skip


def merged(wanted: Recipe, folder: Path) -> Path:
    run(make_plan(wanted), folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a model's weights."""
    state = load_file(folder / FILE)
    edit(state)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / FILE, {"format": "pt"})


def cnn_family(folder: Path, *, spread: float) -> tuple[Path, list[Path]]:
    """Write networks with BatchNorm whose experts' statistics lie `spread` apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = cnn().state_dict()
    found: list[Path] = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        own = {
            name: t + 0.01 * index * torch.randn(t.shape, generator=generator)
            if t.is_floating_point() and "running" not in name
            else t.clone()
            for name, t in state.items()
        }
        for name in own:
            if name.endswith("running_mean"):
                own[name] += spread * index
            if name.endswith("num_batches_tracked"):
                own[name] += 100
        found.append(folder / f"model{index}")
        found[-1].mkdir(parents=True)
        save_file(own, found[-1] / FILE, {"format": "pt"})
    return found[0], found[1:]


def give_tokenizer(folder: Path, tokens: list[str], **settings: Any) -> None:
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


HEALTHY = {
    "llama": ("average", ()),
    "qwen2 tied": ("task_arithmetic", ()),
    "gemma3": ("ties", ("density=0.5",)),
    "phi3 fused": ("dare", ("density=0.05",)),  # 4.5 times as long a task vector, by design
    "gpt2 conv1d": ("slerp", ()),
    "t5": ("model_stock", ()),
    "bert classes": ("sce", ()),
    "mixtral": ("breadcrumbs", ()),
    "neox fused": ("iso_c", ()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_it_is_silent_on_healthy_merges(name: str, tmp_path: Path) -> None:
    base, experts = language_toys.family(name, tmp_path, size=0.004)
    for folder in (base, *experts):
        give_tokenizer(folder, TOKENS, eos_token="</s>", chat_template="{{ messages }}")
    method, settings = HEALTHY[name]
    wanted = recipe(base, experts, method, *settings)
    assert doctor(wanted).troubles == ()
    after = doctor(merged=merged(wanted, tmp_path / "out"))
    assert (after.troubles, after.notes, dict(after.left_out)) == ((), (), {})
    assert after.probe is not None and len(after.probe.answers) == 3


def test_it_is_silent_on_a_healthy_network_with_batch_norm(tmp_path: Path) -> None:
    wanted = recipe(*cnn_family(tmp_path, spread=0.01), "average")
    assert doctor(wanted).troubles == ()
    save_file({"images": torch.randn(40, 3, 16, 16)}, tmp_path / "data.safetensors")
    found = doctor(
        merged=merged(wanted, tmp_path / "out"), data=tmp_path / "data.safetensors",
        model_factory=CNN,
    )  # fmt: skip
    assert found.troubles == () and found.probe is not None
    assert found.probe.own and found.probe.inputs == 32


Plant = Callable[[Path, list[Path]], None]


def other_base(base: Path, experts: list[Path]) -> None:
    def redraw(state: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(9)
        state |= {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()}

    change(experts[1], redraw)


def other_vocabulary(base: Path, experts: list[Path]) -> None:
    for folder in (base, experts[0]):
        give_tokenizer(folder, TOKENS)
    give_tokenizer(experts[1], ["<s>", "</s>", "b", "a"])


def too_few_rows(base: Path, experts: list[Path]) -> None:
    for folder in (base, *experts):
        give_tokenizer(folder, [f"t{n}" for n in range(60)])


def other_template(base: Path, experts: list[Path]) -> None:
    for number, folder in enumerate((base, *experts)):
        give_tokenizer(folder, TOKENS, chat_template="{{ m }}" + "!" * (number // 2))


def other_end(base: Path, experts: list[Path]) -> None:
    for folder, end in zip((base, *experts), ("</s>", "</s>", "b"), strict=True):
        give_tokenizer(folder, TOKENS, eos_token=end)


def no_tokenizer(base: Path, experts: list[Path]) -> None:
    for folder in experts:
        give_tokenizer(folder, TOKENS)


def quantised(base: Path, experts: list[Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def pack(state: dict[str, Tensor]) -> None:
        state[name.replace("weight", "qweight")] = state.pop(name).to(torch.int32)

    change(experts[1], pack)


def unchanged(base: Path, experts: list[Path]) -> None:
    (experts[1] / FILE).write_bytes((base / FILE).read_bytes())


def twice(base: Path, experts: list[Path]) -> None:
    (experts[1] / FILE).write_bytes((experts[0] / FILE).read_bytes())


def not_a_number(base: Path, experts: list[Path]) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][0, :2] = float("nan")

    change(experts[1], spoil)


def untied(base: Path, experts: list[Path]) -> None:
    path = experts[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


def too_fine(base: Path, experts: list[Path]) -> None:
    """Task vectors a hundred times finer than bfloat16, in which the base is stored."""
    start = load_file(base / FILE)
    for folder in experts:
        change(folder, lambda s: s.update({n: start[n] + 1e-2 * (s[n] - start[n]) for n in s}))
    change(base, lambda s: s.update({n: t.bfloat16() for n, t in s.items()}))
    change(experts[0], lambda s: s.update({n: start[n].bfloat16() + s[n] - start[n] for n in s}))
    change(experts[1], lambda s: s.update({n: start[n].bfloat16() + s[n] - start[n] for n in s}))


PLANTED: dict[str, tuple[Plant, str]] = {
    "other_base": (other_base, "came from another base"),
    "vocabulary": (other_vocabulary, "'b' is 2 here and 3 there"),
    "vocabulary rows": (too_few_rows, "has 50 rows but its tokenizer has tokens up to number 59"),
    "chat_template": (other_template, "trained with a chat template and"),
    "chat_template end": (other_end, "its eos_token is 'b', but '</s>'"),
    "missing_files": (no_tokenizer, "no tokenizer files"),
    "quantised": (quantised, "model.layers.1.mlp.up_proj.qweight"),
    "nothing_changed": (unchanged, "no weight differs from the base"),
    "duplicate_experts": (twice, "one expert counts twice"),
    "not_finite": (not_a_number, "2 weights are NaN or infinite, in model.layers.1.mlp.up_proj"),
    "tied_weights": (untied, "config.json ties lm_head.weight to model.embed_tokens.weight"),
    "dtype_loss": (too_fine, "rounding to bfloat16"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_named_before_the_merge(case: str, tmp_path: Path) -> None:
    base, experts = language_toys.family("llama", tmp_path, size=0.004)
    plant, says = PLANTED[case]
    plant(base, experts)
    found = doctor(recipe(base, experts, "average"))
    named = {each.examination for each in found.troubles}
    assert named - {"planning"} == {case.partition(" ")[0]}
    assert says in " ".join(each.sentence for each in found.troubles)
    guilty = {"missing_files": "the base", "dtype_loss": "the merge"}.get(case, str(experts[1]))
    assert guilty in {each.where for each in found.troubles}


def sentences(found: Visit, examination: str) -> str:
    assert {each.examination for each in found.troubles} == {examination}
    return " ".join(each.sentence for each in found.troubles)


def test_overscaled_merges_are_named_before_and_after(tmp_path: Path) -> None:
    base, experts = language_toys.family("llama", tmp_path, size=0.001)
    wanted = recipe(base, experts, "task_arithmetic", "scale=3")
    assert "would lie 4.2 times as far" in sentences(doctor(wanted), "overscaled")
    after = doctor(merged=merged(wanted, tmp_path / "out"))
    assert "lies 4.2 times as far" in sentences(after, "overscaled")


@pytest.mark.parametrize(
    ("method", "settings", "shares"),
    [
        ("average", (), (0.25, 0.75)),
        ("average", ("normalize=false",), (1.0, 3.0)),
        ("task_arithmetic", (), (0.3, 0.9)),  # its scale is 0.3 unless another is given
        ("task_arithmetic", ("scale=2", "divide=count"), (1.0, 3.0)),
        ("task_arithmetic", ("scale=2", "divide=coefficients"), (0.5, 1.5)),
        ("ties", (), (0.25, 0.75)),
    ],
)
def test_shares_are_those_of_a_plain_merge(
    method: str, settings: tuple[str, ...], shares: tuple[float, float]
) -> None:
    found = recipe_from_flags(
        base="b", experts=["one:1", "two:3"], method=method, settings=settings
    )
    assert shares_of(found) == pytest.approx(shares)


def test_averaged_statistics_are_named_until_they_are_measured(tmp_path: Path) -> None:
    base, experts = cnn_family(tmp_path, spread=2.0)
    wanted = recipe(base, experts, "average")
    assert "mergewell repair DIR" in sentences(doctor(wanted), "batch_norm")
    out = merged(wanted, tmp_path / "out")
    assert f"mergewell repair {out}" in sentences(doctor(merged=out), "batch_norm")
    change(experts[1], lambda s: s["norm.running_var"].fill_(-1))
    assert "norm.running_var holds variances below zero" in sentences(doctor(wanted), "batch_norm")
    fresh = {"norm.running_var": 1, "norm.running_mean": 0, "norm.num_batches_tracked": 0}
    change(experts[1], lambda s: [s[name].fill_(value) for name, value in fresh.items()])
    assert "were never measured" in sentences(doctor(wanted), "batch_norm")


def test_a_result_that_is_not_its_recipes_is_named(tmp_path: Path) -> None:
    out = merged(
        recipe(*language_toys.family("llama", tmp_path, size=0.004), "average"), tmp_path / "out"
    )
    change(out, lambda s: s.update({n: t + 0.001 for n, t in s.items()}))
    assert "is not what its recipe gives" in sentences(doctor(merged=out), "identity")


def test_a_result_that_is_its_base_is_named(tmp_path: Path) -> None:
    base, experts = language_toys.family("llama", tmp_path, size=0.004)
    found = doctor(recipe(base, experts, "average"), merged=base)  # of another tool
    assert "so nothing was merged" in sentences(found, "nothing_changed")


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (lambda weight, bias: (0 * weight, 0 * bias), "near uniform"),
        (lambda weight, bias: (weight, bias * float("inf")), "with NaN or infinity"),
    ],
)
def test_answers_unlike_the_experts_are_named(
    head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], says: str, tmp_path: Path
) -> None:
    """A result of other tools, without a manifest: only its numbers speak."""
    base, experts = cnn_family(tmp_path, spread=0.0)
    for folder in (base, *experts):
        change(folder, lambda s: s["head.weight"].mul_(60))
    wanted = recipe(base, experts, "average")
    out = merged(wanted, tmp_path / "out")
    (out / "manifest.json").unlink()

    def spoil(state: dict[str, Tensor]) -> None:
        state["head.weight"], state["head.bias"] = head(state["head.weight"], state["head.bias"])

    change(out, spoil)
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(32, 3, 16, 16, generator=generator)
    save_file({"images": images}, tmp_path / "data.safetensors")
    found = doctor(wanted, merged=out, data=tmp_path / "data.safetensors", model_factory=CNN)
    assert says in " ".join(t.sentence for t in found.troubles if t.examination == "answers")


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ((0.5, 0.3), False),
        ((0.84, 0.3), False),  # a quarter of the least certain expert's certainty, 0.6, is kept
        ((0.86, 0.3), True),
        ((0.5, 0.94), False),
        ((0.5, 0.96), True),
    ],
)
def test_entropy_and_the_commonest_answer_are_held_against_the_experts(
    result: tuple[float, float], told: bool
) -> None:
    answers = [Answers("a", True, 0.4, 0.7), Answers("b", True, 0.2, 0.5)]
    probe = Probe((*answers, Answers("out", True, *result)), 32, own=False)
    found = [*EXAMINATIONS.build("answers", {}).examine(Patient(None, (), probe=probe))]
    assert bool(found) == told


def test_a_method_that_does_not_give_one_expert_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(*language_toys.family("llama", tmp_path, size=0.004), "magmax")
    assert doctor(wanted).troubles == ()
    right = Magmax.merge
    monkeypatch.setattr(Magmax, "merge", lambda self, group: right(self, group) * 1.001)
    assert "magmax: of one expert alone" in sentences(doctor(wanted), "identity")


def test_the_command_says_so_in_one_line_and_strict_is_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = language_toys.family("llama", tmp_path, size=0.004)
    flags = ["--base", str(base)] + [p for e in experts for p in ("--expert", str(e))]
    assert main(["doctor", *flags, "--strict"]) == 0
    line, *rest = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing found; looked at 3 models, 21 tensors: ")
    assert all(each.startswith("Not looked at: ") for each in rest)
    unchanged(base, experts)
    assert main(["doctor", *flags]) == 0
    assert "Does damage:\n- " in capsys.readouterr().out
    assert main(["doctor", *flags, "--strict", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == 1 and not told["healthy"]
    assert told["findings"][0]["examination"] == "nothing_changed"
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2


def test_a_result_whose_inputs_are_gone_is_looked_at_alone(tmp_path: Path) -> None:
    base, experts = language_toys.family("llama", tmp_path, size=0.004)
    out = merged(recipe(base, experts, "average"), tmp_path / "out")
    (experts[0] / FILE).unlink()
    change(out, lambda s: s["model.norm.weight"].fill_(float("nan")))
    found = doctor(merged=out)
    assert "The inputs were not looked at" in found.notes[0]
    assert [each.examination for each in found.troubles] == ["not_finite"]
    assert {"other_base", "identity", "answers"} <= found.left_out.keys()
