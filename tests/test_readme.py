"""What the README and the pages in docs/ show works: the library example runs, commands make configs, links lead somewhere."""

import functools
import re
import shlex
from pathlib import Path

import hydra
import pytest
import torch
from pages import list_examples
from torch.utils.checkpoint import checkpoint

import concentration
from concentration.config import VERBS, check_config, find_config_directory
from concentration.stages.verbs import split_words

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    """Of the README and of the cluster's page: lines, and code in lines, that start with `concentrate VERB`.

    Lines that end in a backslash are joined.
    """
    text = (README + (ROOT / "docs/cluster.md").read_text(encoding="utf-8")).replace("\\\n", " ")
    found = re.findall(r"^    (concentrate \w+ .*)$", text, re.MULTILINE) + re.findall(
        r"`(concentrate \w+ [^`]*)`", text
    )
    return [command for command in dict.fromkeys(found) if "KEY=" not in command and command.split()[1] in VERBS]


def test_the_library_example_runs():
    [example] = list_examples("README.md", "As a library")
    variables: dict = {}
    exec(compile(example, "README.md", "exec"), variables)
    assert variables["loss"].isfinite()
    assert variables["top"].classifiers[0].weight.grad is not None


def test_the_page_of_the_library_runs(tmp_path, monkeypatch):
    """All but its section on shards, which tests/stages/test_targets.py runs on a working directory."""
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    for section in ("Your own loop", "A whole network, and its file", "Metrics"):
        [example] = list_examples("docs/library.md", section)
        exec(compile(example, f"docs/library.md, {section}", "exec"), variables)
    assert variables["network"].top.classifiers[0].weight.grad.isfinite().all()
    student, photos = variables["student"], variables["photos"]
    assert torch.equal(variables["logits_BC"], student(photos))
    assert student(photos).sigmoid().median().item() == pytest.approx(1 / 500, rel=0.5)
    assert variables["ap_V"][:2] == pytest.approx([1.0, 1.0])


def test_what_the_page_of_the_library_says_of_the_two_losses_is_so():
    def build(dtype=torch.float32) -> tuple:
        torch.manual_seed(0)
        hidden, classify = torch.randn(2, 3, dtype=dtype, requires_grad=True), torch.nn.Linear(3, 4, dtype=dtype)
        return hidden, classify, concentration.SoftTargets.from_labels([[1], [0, 3]])

    def readable(hidden, classify, targets):
        return concentration.sigmoid_cross_entropy([classify(hidden)], targets)

    def fused(hidden, classify, targets, gradients="forward"):
        heads = [concentration.HeadParameters(classify.weight, classify.bias)]
        return concentration.fused_loss_by_vertical([hidden], heads, targets, gradients=gradients).sum(1)

    for compute_loss in (readable, functools.partial(fused, gradients="backward")):
        loss_B = compute_loss(*build())
        (loss_B * torch.tensor([1.0, 2.0])).sum().backward(retain_graph=True)
        loss_B.sum().backward()
    for compute_loss in (readable, fused):
        checkpoint(compute_loss, *build(), use_reentrant=False).sum().backward()
    hidden, *others = build()
    torch.func.grad(lambda hidden: readable(hidden, *others).sum())(hidden)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda hidden: fused(hidden, *others).sum())(hidden)
    torch.compile(readable, fullgraph=True, backend="aot_eager")(*build())
    torch.compile(fused, backend="aot_eager")(*build()).sum().backward()


def test_the_readme_names_the_two_commands_that_the_makefile_has():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", _commands())
def test_a_command_of_the_pages_makes_a_config(command):
    _, verb, *words = shlex.split(command, comments=True)
    overrides = [word.replace("FOLDER", "/images") for word in words if word not in ("-m", "--help")]
    overrides, given_words = split_words(overrides) if VERBS[verb].positional else (overrides, [])
    if "-m" in words:  # the first job of a multirun stands for all
        overrides = [re.sub(r"=([^\[,]+),.*$", r"=\1", override) for override in overrides]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        assert check_config(verb, hydra.compose(verb, overrides), given_words)


def test_the_readme_has_commands_to_compose():
    assert len(_commands()) >= 3


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_that_the_page_of_the_method_names_are_there():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:[a-z_]+/)*[a-z_0-9]+\.py`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "concentration" / name.strip("`")).exists()] == []
