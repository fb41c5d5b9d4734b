"""`diff` between two methods shows the algorithms: banners, options, names and the steps of the loop are the
same in all."""

import ast
import dataclasses
import importlib
import itertools
import re
import subprocess

import pytest
from helpers import ROOT

METHODS = ["swav", "selav2", "deepclusterv2", "deepcluster", "odc", "sela"]
# As `make diff` has them: steps that the documentation tells.
PAIRS = [("swav", "selav2"), ("selav2", "deepclusterv2"), ("deepclusterv2", "deepcluster"),
         ("deepcluster", "odc"), ("deepcluster", "sela")]
BANNERS = ["recipes", "model", "algorithm", "training"]
STEPS = ["assign", "schedule", "move", "forward", "assign", "loss", "memory", "update", "log"]
# Options whose help names what the method does with them; everything else is said in the same words
# everywhere.
OWN_WORDS = {"prototypes", "crops", "eval_size", "kmeans_iterations", "lr", "momentum"}


def source(method):
    return (ROOT / f"{method}.py").read_text()


def fields(method):
    return {f.name: f for f in dataclasses.fields(importlib.import_module(method).Config)}


def functions(method):
    """{name: text} of the top-level functions and classes, in order."""
    text = source(method)
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node,
                                                                                                      "name")}


@pytest.mark.parametrize("method", METHODS)
def test_anatomy(method):
    text = source(method)
    docstring = ast.get_docstring(ast.parse(text))
    assert len(
        docstring.splitlines()) <= 25 and "arXiv" in docstring and f"{method}.py --eval-every 5" in docstring
    assert re.findall(r"^# -+ (\w+)$", text, re.M) == BANNERS
    names = list(functions(method))
    assert [n for n in names if n in (
        "Config", "Model", "Memory", "assign", "prediction_loss", "train_one_epoch",
        "main")] == ["Config", "Model", "Memory", "assign", "prediction_loss", "train_one_epoch", "main"]
    assert names[0] == "Config" and names[-2:] == ["train_one_epoch", "main"]
    assert text.index("\nRECIPES = ") < text.index("\nREMEDY = ")


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_has_the_same_steps_in_the_same_order(method):
    steps = re.findall(r"^        # (\w+)(?=:|$)", functions(method)["train_one_epoch"], re.M)
    wanted = iter(STEPS)
    assert all(step in wanted for step in steps), steps  # a subsequence
    assert {"schedule", "move", "forward", "loss", "update",
            "log"} <= set(steps) and len(steps) == len(set(steps))


@pytest.mark.parametrize("one", METHODS)
def test_shared_options_are_the_same(one):
    mine = fields(one)
    for other in METHODS:
        theirs = fields(other)
        shared = [name for name in mine if name in theirs]
        assert shared == [name for name in theirs if name in mine], f"order of options in {one} and {other}"
        for name in shared:
            a, b = mine[name], theirs[name]
            assert a.type == b.type, (one, other, name)
            assert a.metadata.get("free") == b.metadata.get("free") or name == "eval_size", (one, other, name)
            assert a.metadata["help"] == b.metadata["help"] or name in OWN_WORDS, (one, other, name)


@pytest.mark.parametrize("method", METHODS)
def test_remedies_name_options(method):
    remedy = importlib.import_module(method).REMEDY
    assert {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", remedy)} <= set(fields(method))
    assert not re.search(r"(fewer|more|lower|milder) [^-]", remedy.replace("README.md says more", ""))


@pytest.mark.parametrize("method", METHODS)
def test_no_option_is_dead(method):
    """Each option is read by the script, or by what all scripts share."""
    text = source(method)
    shared = "".join(file.read_text() for file in [*(ROOT / "common" / "engine").glob("*.py"),
                                                   ROOT / "common" / "data.py"])
    body = text[text.index("class Model") :]
    for name in fields(method):
        assert re.search(rf"\bconfig\.{name}\b", body) or re.search(rf"\b(c|config)\.{name}\b|\"{name}\"",
                                                                    shared), name


@pytest.mark.parametrize("method", METHODS)
def test_every_letter_of_a_shape_is_in_the_legend(method):
    text = source(method)
    legend = re.search(r"^# Letters in shapes: (.*)$", text, re.M)[1]
    shapes = re.findall(r"\(([A-Zn](?: [A-Z])?(?:, [^()]*)?|[A-Z], [^()]*)\)",
                        text[text.index("class Model") :])
    used = {letter for shape in shapes for letter in re.findall(r"\b[A-Zn]\b", shape)}
    local = set(re.findall(r"\bthe ([A-Z]) ", text))  # said where it is used
    assert {"B", "K"} <= used and used <= set(re.findall(r"\b[A-Zn]\b", legend)) | local


@pytest.mark.parametrize("method", METHODS)
def test_names_are_the_words_of_all(method):
    names = {node.id for node in ast.walk(ast.parse(source(method))) if isinstance(node, ast.Name)}
    assert not names & {"labels", "views", "nmb_crops"}  # ground truth alone; crops


def test_what_is_the_same_is_the_same_text():
    """Where methods do the same, a bug is mended by the same patch."""
    for name, methods in {"prediction_loss": ["deepclusterv2", "selav2", "sela"],
                          "fill": ["deepclusterv2", "selav2"]}.items():
        # without docstring
        bodies = [[ast.unparse(line) for line in ast.parse(functions(m)[name]).body[0].body[1:]]
                  for m in methods]
        assert all(body == bodies[0] for body in bodies), name
    for lines in ("def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):\n",
                  "    for step, (index, crops, params) in run.steps(loader, batches, epoch):\n",
                  '    run = Run(config, info["method"], images, steps_per_epoch, meter, objects, '
                  'model.backbone, info, device, REMEDY)\n', "    net = parallel(model)\n",
                  "    run.resume()\n    for epoch in run.epochs():\n",
                  '    loader = data.Loader(crops, config.workers, device.type == "cuda")\n',
                  "    launch(main, parse(Config, RECIPES, __doc__))\n",
                  "        optimizer.zero_grad()\n        loss.backward()\n"):
        assert all(source(method).count(lines) == 1 for method in METHODS), lines
    for methods, lines in (
        ("selav2 deepclusterv2 deepcluster odc sela", 'raise DataError(f"--prototypes {K}: more than the '
                                                      '{readable} images that can be read")'),
        ("selav2 deepclusterv2 odc", "row = torch.where((index >= self.first) & (index < self.last), index - "
                                     "self.first, self.own)"),
        ("selav2 deepclusterv2 sela", '; a lower --lr may help") from None\n'),
        ("selav2 deepclusterv2 deepcluster odc", '            with run.phase("clusters"):\n'),
        ("deepcluster sela", "--arch {config.arch} takes images of 224 pixels and has no other width or "
                             "stem: --sizes 224 --eval-size 0")):
        assert all(source(method).count(lines) == 1 for method in methods.split()), lines


def test_make_diff_compares_all_methods():
    assert set(itertools.chain(*PAIRS)) == set(METHODS)
    assert f"@set -- {'  '.join(map(' '.join, PAIRS))}; while" in (ROOT / "Makefile").read_text()


def test_readme_counts_what_make_diff_counts():
    rows = re.findall(r"^\| `(\w+\.py) (\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert [(a, b) for a, b, _ in rows] == [(f"{a}.py", f"{b}.py") for a, b in PAIRS]
    for a, b, lines in rows:
        found = subprocess.run(["diff", "-w", a, b], cwd=ROOT, capture_output=True, text=True).stdout
        assert int(lines) == len(re.findall("^[<>]", found, re.M)), f"diff -w {a} {b}: README.md says {lines}"


def test_docs_link_to_the_lines_they_name():
    text = (ROOT / "docs" / "methods.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", text)
    assert len(links) > 10
    for name, path, number in links:
        lines = (ROOT / path).read_text().splitlines()
        here = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
        assert int(number) in here, f"docs/methods.md: {name} of {path} is now in line {here}, not {number}"
    for path in re.findall(r"\]\((\.\./[\w/.]+)", text):
        assert (ROOT / "docs" / path).exists(), path
