"""`diff` between two methods shows the algorithms: banners, options, names and the steps of the loop are the
same in all."""

import ast
import dataclasses
import graphlib
import importlib
import itertools
import re
import subprocess

import pytest
import torch
from helpers import ROOT

from common.engine.options import recipe
from common.sinkhorn import sinkhorn

METHODS = ["swav", "selav2", "deepclusterv2", "deepcluster", "odc", "sela"]
# As `make diff` has them: steps that the documentation tells.
PAIRS = [("swav", "selav2"), ("selav2", "deepclusterv2"), ("deepclusterv2", "deepcluster"),
         ("deepcluster", "odc"), ("deepcluster", "sela")]
BANNERS = ["recipes", "model", "algorithm", "training"]
STEPS = ["assign", "schedule", "move", "forward", "assign", "loss", "memory", "update", "log"]
# Options whose help names what the method does with them; everything else is said in the same words
# everywhere.
OWN_WORDS = {"eval_size", "kmeans_iterations", "momentum"}


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
    wanted = ["Config", "Model", "Queue" if method == "swav" else "Memory", "assign", "prediction_loss",
              "train_one_epoch", "main"]
    assert [n for n in names if n in wanted] == wanted
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
    legend = re.search(r"^# Letters in shapes: (.*\n(# .*\n)+)", text, re.M)[1]
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
    for lines in (
        "    for step, (index, crops, params) in run.steps(loader, batches, epoch):\n",
        "        crops = to_device(crops, params, run.device, dtype)  # per resolution (V_r B, 3, s, s)\n",
        "    device, images = setup(config)\n",
        "    net = prepare(model, config, device)\n",
        "    for epoch in run.epochs():\n",
        '    loader = data.Loader(crops, config.workers, device.type == "cuda")\n',
        "    launch(main, parse(Config, RECIPES, __doc__))\n",
        "        optimizer.zero_grad()\n        loss.backward()\n",
    ):
        assert all(source(method).count(lines) == 1 for method in METHODS), lines
    too_few = 'raise DataError(f"--prototypes {K}: more than the {readable} images that can be read")'
    for methods, lines in (
        ("selav2 deepclusterv2 deepcluster odc sela", too_few),
        ("selav2 deepclusterv2 deepcluster odc sela",
         "def train_one_epoch(net, optimizer, memory, loader, run, config, epoch):\n"),
        ("selav2 deepclusterv2 sela", '; a lower --lr may help") from None\n'),
        ("selav2 deepclusterv2 deepcluster odc", '            with run.timed("clusters"):\n'),
        ("deepcluster sela", "takes images of 224 pixels and has no other width or"),
    ):
        assert all(source(method).count(lines) == 1 for method in methods.split()), lines


def test_a_loop_asks_seven_things_of_its_run():
    for method in METHODS:
        asked = set(re.findall(r"\brun\.(\w+)", source(method).split("def main(")[0]))
        assert asked <= {"images", "device", "steps", "autocast", "log", "features", "timed"}, method


def imported(path):
    """The project's modules that a file imports at the top, and those that it imports inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found, tree = [set(), set()], ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
            is_module = [any((ROOT / name.replace(".", "/")).with_suffix(end).exists() for end in ("", ".py"))
                         for name in names]
            names = [name if known else ".".join(base) for name, known in zip(names, is_module)]
        found[node not in tree.body] |= {name for name in names if name.split(".")[0] == "common"}
    return found


# Each line may import what stands above it.
LAYERS = ["engine.errors engine.files", "resnet alexnet sinkhorn kmeans optim multicrop distributed",
          "sources", "data batchnorm", "features", "engine", "weights", "evaluation"]


def layer(module):
    """Place of a module of common in LAYERS."""
    name = module.removeprefix("common.")
    whole = [i for i, names in enumerate(LAYERS) if name in names.split()]
    return whole[0] if whole else next(i for i, names in enumerate(LAYERS)
                                       if name.split(".")[0] in names.split())


def test_imports_go_one_way():
    needs, inside = {}, set()
    for path in (ROOT / "common").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        needs[module], later = imported(path)
        inside |= later
        for other in needs[module] - {module}:
            folder = module.split(".")[1]
            beside = other.split(".")[1] == folder and (ROOT / "common" / folder).is_dir()
            assert layer(other) < layer(module) or beside, f"{module} imports {other}"
    # raises for a circle
    graphlib.TopologicalSorter({m: others - {m} for m, others in needs.items()}).prepare()
    assert not needs["common"] and not needs["common.engine.errors"]
    assert needs["common.engine.files"] == {"common.engine.errors"}
    alone = {"resnet", "alexnet", "sinkhorn", "kmeans", "optim", "multicrop", "evaluation/pooling",
             "weights/preact"}
    assert all(imported(ROOT / "common" / f"{name}.py") == [set(), set()] for name in alone)
    assert inside <= {"common.weights", "common.sources.files", "common.sources.lists",
                      "common.sources.named", "common.sources.shapes", "common.sources.tars",
                      "common.sources.own",
                      "common.engine.held_out"}, inside
    for path in ROOT.glob("*.py"):
        scripts = {node.module for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, ast.ImportFrom)}
        assert not scripts & {*METHODS, *(p.stem for p in ROOT.glob("eval_*.py"))}, path


def test_make_diff_compares_all_methods():
    assert set(itertools.chain(*PAIRS)) == set(METHODS)
    assert f"@set -- {'  '.join(map(' '.join, PAIRS))}; while" in (ROOT / "Makefile").read_text()


def test_the_page_counts_what_make_diff_counts():
    page = (ROOT / "docs/layout.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py) (\w+\.py)` \| (\d+) \|", page, re.M)
    assert [(a, b) for a, b, _ in rows] == [(f"{a}.py", f"{b}.py") for a, b in PAIRS]
    for a, b, lines in rows:
        found = subprocess.run(["diff", "-w", a, b], cwd=ROOT, capture_output=True, text=True).stdout
        number = len(re.findall("^[<>]", found, re.M))
        assert int(lines) == number, f"diff -w {a} {b}: {number} lines, docs/layout.md says {lines}"


@pytest.mark.parametrize("page, least", [("methods.md", 10), ("one_step.md", 5)])
def test_docs_link_to_the_lines_they_name(page, least):
    text = (ROOT / "docs" / page).read_text()
    links = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", text)
    assert len(links) > least
    for name, path, number in links:
        lines = (ROOT / path).read_text().splitlines()
        here = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
        assert int(number) in here, f"docs/{page}: {name} of {path} is now in line {here}, not {number}"
    for path in re.findall(r"\]\((\.\./[\w/.]+)", text):
        assert (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("method", METHODS)
def test_behind_the_head_all_has_the_precision_of_the_weights(method):
    """The trunk computes in bfloat16 under autocast; embeddings, scores, codes and loss do not."""
    script = importlib.import_module(method)
    config = dataclasses.replace(recipe(script.Config, script.RECIPES, "shapes"), width=0.125, prototypes=4)
    model, trunk = script.Model(config), []
    model.backbone.register_forward_hook(lambda module, x, y: trunk.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = model([torch.randn(8, 3, 24, 24)])
    heads = scores if isinstance(scores, list) else [scores]
    heads = [s.view(2, 4, -1) for s in heads]  # two crops of four images
    targets = torch.zeros(len(heads), 4, dtype=torch.int64)
    arguments = {"swav": (heads[0], heads[0].detach().softmax(2)), "deepcluster": (heads[0], targets[0]),
                 "odc": (heads[0], targets[0], torch.full((4,), 0.25))}.get(method, (heads, targets))
    loss = script.prediction_loss(*arguments, 0.1)
    codes = sinkhorn(heads[0][0].detach())
    assert trunk == [torch.bfloat16]
    assert {z.dtype, loss.dtype, codes.dtype, *(s.dtype for s in heads)} == {torch.float32}
