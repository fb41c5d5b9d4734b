"""How images look: one scale for the grey of a set, upright, transparency on white; and who reads it."""

import json

import numpy as np
import pytest
import torch
from evaluations import CPU, evaluate, export, refuses, run_here
from helpers import TINY, image_tree, same, saved, swav_here
from PIL import Image, ImageOps

import eval_cluster
import eval_knn
import eval_linear
import eval_semisup
import eval_svm
import swav
from common import data, weights
from common.engine.errors import ArgumentError, DataError
from common.engine.held_out import held_out, open_queries
from common.engine.launch import launch
from common.engine.options import check, recipe
from common.sources import files
from common.weights.__main__ import arguments, main

RAMP = np.arange(64 * 64).reshape(64, 64) / 4095  # 0 .. 1


def grey(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def shown(images, i=0):
    """Of an image of grey: (64, 64) 0 .. 255."""
    rgb = np.asarray(images.read(i)).astype(float)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


KINDS = {  # pixels from 0 to 1 as a file may hold them
    **{f"float up to {top:g}": ("tif", lambda x, top=top: (x * top).astype(np.float32))
       for top in (1, 1.05, 256, 1400)},
    "10 bits in 16": ("png", lambda x: (x * 1023).astype(np.uint16)),
    "12 bits in 16": ("tif", lambda x: (x * 4095).astype(np.uint16)),
    "16 bits": ("png", lambda x: (x * 65535).astype(np.uint16)),
    "big-endian": ("tif", lambda x: (x * 65535).astype(">u2")),
    "z-scores": ("tif", lambda x: ((x - 0.5) * 5).astype(np.float32)),
    "CT numbers": ("tif", lambda x: (x * 4095 - 1024).astype(np.int32)),
    "16 bits with a sign": ("tif", lambda x: (x * 4095 - 1024).astype(np.int16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_has_one_scale(kind, tmp_path, capsys):
    """Its darkest and brightest images are black and white, whatever the numbers; a dark one stays dark."""
    ending, write = KINDS[kind]
    grey(tmp_path / f"a.{ending}", write(RAMP))
    grey(tmp_path / f"b.{ending}", write(RAMP / 4))
    images = data.open_images(tmp_path)
    assert np.abs(shown(images) - RAMP * 255).max() < 2
    assert np.abs(shown(images, 1) - RAMP / 4 * 255).max() < 2
    low, high = images.range
    ends = write(np.array([0.0, 1.0])).astype(float)
    assert images.range == pytest.approx(ends, abs=np.ptp(ends) / 200) and images.exif is False
    said = capsys.readouterr().out
    assert f"from {low:g} (black) to {high:g} (white)" in said and said.count("\n") == 1
    cut = float(said.split("; ")[1].split(" %")[0])
    assert 0 < cut < 0.3 and "the pixels of 2 images lie beyond" in said


def test_no_cliff_lies_at_1(tmp_path):
    for name, top in (("below", 1.0), ("above", 1.05)):
        grey(tmp_path / name / "a.tif", (RAMP * top).astype(np.float32))
    below, above = (shown(data.open_images(tmp_path / name)) for name in ("below", "above"))
    assert np.abs(below - above).max() <= 1 and above.mean() > 120


def test_a_given_range_is_used_and_what_it_cuts_is_said(tmp_path, capsys):
    grey(tmp_path / "a.tif", (RAMP * 1000).astype(np.float32))
    images = data.open_images(tmp_path, range=(250, 500))
    assert images.range == (250, 500)
    assert np.abs(shown(images) - (RAMP * 4 - 1).clip(0, 1) * 255).max() <= 1
    said = "from 250 (black) to 500 (white); 75 % of the pixels of 1 images lie beyond"
    assert said in capsys.readouterr().out


@np.errstate(divide="raise", invalid="raise")
def test_nothing_divides_by_zero_and_nan_is_black(tmp_path):
    grey(tmp_path / "constant" / "a.png", np.full((8, 8), 700, np.uint16))
    images = data.open_images(tmp_path / "constant")
    assert images.range == (700, 700) and (shown(images) == 0).all()
    holes = RAMP.astype(np.float32) + 5
    holes[0, :3] = np.nan, np.inf, -np.inf
    grey(tmp_path / "holes" / "a.tif", holes)
    images = data.open_images(tmp_path / "holes")
    assert images.range == pytest.approx((5, 6), abs=0.01) and shown(images)[0, :3].tolist() == [0, 255, 0]
    grey(tmp_path / "empty" / "a.tif", np.full((8, 8), np.nan, np.float32))
    assert (shown(data.open_images(tmp_path / "empty")) == 0).all()


def test_the_sample_is_of_such_grey_alone(tmp_path, monkeypatch, capsys):
    for i in range(600):
        Image.new("L", (4, 4), i % 256).save(tmp_path / f"{i:03}.png")
    grey(tmp_path / "000.png", (RAMP * 65535).astype(np.uint16))
    grey(tmp_path / "599.png", (RAMP * 65535 / 8).astype(np.uint16))
    opened, loaded, image_open = [], [], Image.open
    real = np.asarray
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(path) or image_open(path, **how))
    monkeypatch.setattr(files.np, "asarray", lambda image: loaded.append(image.filename) or real(image))
    images = data.open_images(tmp_path)
    assert len(opened) == 256 and len(loaded) == 2  # a header costs little, pixels much
    assert images.range[1] == pytest.approx(65535, rel=0.01)
    assert "of 2 images" in capsys.readouterr().out


def test_a_set_of_8_bits_is_as_it_was(tmp_path, capsys):
    """Bit for bit, with a range or without; a range that is given is said to be of no use."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {"a.png": rgba, "b.png": rgba.convert("LA"), "c.png": rgba.convert("RGB").quantize(9),
            "d.jpg": rgba.convert("CMYK"), "e.png": rgba.convert("1"), "f.png": rgba.convert("L")}
    for name, image in made.items():
        image.save(tmp_path / name, exif=exif)
    rgba.quantize(9).save(tmp_path / "g.gif", transparency=0)
    for images in (data.open_images(tmp_path), data.open_images(tmp_path, range=(0, 1))):
        for i, name in enumerate(images.paths):
            assert images.read(i).tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes(), name
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--range is only for grey of more than 8 bits" in said
    assert data.open_images(tmp_path).range == () and capsys.readouterr().out == ""


@pytest.mark.parametrize("mode, ending", [("RGB", "jpg"), ("RGB", "png"), ("RGB", "webp"), ("RGB", "tif"),
                                          ("L", "jpg"), ("I;16", "png"), ("I;16", "tif")])
def test_images_are_turned_upright(mode, ending, tmp_path):
    image = Image.fromarray((RAMP[:40] * 255).astype(np.uint8)).convert("L" if mode == "I;16" else mode)
    image = Image.fromarray((RAMP[:40] * 65535).astype(np.uint16)) if mode == "I;16" else image
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        packed = {"compression": "tiff_lzw"} if ending == "tif" else {}  # Pillow 13 garbles turned raw ones
        image.save(tmp_path / f"{orientation}.{ending}", exif=exif, **packed)
    turned, lying = (data.open_images(tmp_path, range=(0, 65535), exif=exif) for exif in (True, False))
    for i, path in enumerate(turned.paths):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / path))
        found = turned.read(i)
        assert found.size == upright.size == ((40, 64) if i > 3 else (64, 40))
        if mode == "I;16":
            upright = Image.fromarray((np.asarray(upright) / 65535 * 255).round().astype(np.uint8))
        assert np.abs(np.asarray(found, int) - np.asarray(upright.convert("RGB"), int)).max() <= 1
        assert ending == "tif" or lying.read(i).size == (64, 40)  # Pillow itself turns a TIFF


def test_an_image_of_voc_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "JPEGImages" / "a.jpg", exif=exif)
    voc = object.__new__(eval_svm.Voc)
    voc.folder, voc.names, voc.look = tmp_path, ["a"], ((), True)
    assert voc.read(0).size == (4, 6)


def test_an_image_with_damaged_exif_stays_as_it_lies(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png", exif=b"Exif\0\0not a header of TIFF")
    with pytest.raises(SyntaxError):
        Image.open(tmp_path / "a.png").getexif()
    assert data.open_images(tmp_path, exif=True).read(0).size == (6, 4)


def test_a_black_logo_lies_on_white(tmp_path):
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:15, 5:15], alpha[5:15, 5] = 255, 128
    logo = Image.merge("RGBA", [Image.new("L", (20, 20))] * 3 + [Image.fromarray(alpha)])
    logo.save(tmp_path / "rgba.png")
    logo.convert("LA").save(tmp_path / "la.png")
    palette = Image.fromarray((alpha > 200).astype(np.uint8)).convert("P")
    palette.putpalette([0] * 768)  # all black
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    Image.fromarray((alpha < 200) * np.uint8(9)).save(tmp_path / "key.png", transparency=9)
    white, black = data.open_images(tmp_path, exif=True), data.open_images(tmp_path)
    for i, path in enumerate(white.paths):
        pixels = shown(white, i)
        assert pixels[0, 0] == 255 and pixels[10, 10] == 0, path
        assert pixels[10, 5] == (127 if "a" in path else 255), path
        assert shown(black, i).max() <= 9, path


# ---- runs and what reads them

SMALL = [*TINY, "--epochs", 2, "--batch-size", 4, "--device", "cpu"]


def scans(root, top=1000.0):
    """train/ and val/ of two classes of float images, val's numbers half as large."""
    rng = np.random.default_rng(0)
    for split, factor in (("train", top), ("val", top / 2)):
        for c in range(2):
            for i in range(6):
                pixels = (RAMP[:40, :40] if c else rng.random((40, 40))) * factor
                grey(root / split / f"n{c}" / f"{i}.tif", pixels.astype(np.float32))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, run directory) of a run of the recipe `small`, judged while it trained."""
    root = scans(tmp_path_factory.mktemp("scans"))
    out = tmp_path_factory.mktemp("run")
    assert swav_here("--recipe", "small", "--data", root, *SMALL, "--eval-every", 1, "--out", out) == 0
    return root, out


def test_a_run_keeps_its_look_and_the_evaluations_take_it(trained, tmp_path, capsys, monkeypatch):
    root, out = trained
    _, info = weights.load_backbone(out)
    found = data.open_images(root).range
    assert info["range"] == found and info["exif"] is True and found[1] == pytest.approx(1000, rel=0.01)
    looks, open_images = {}, data.open_images

    def spy(spec, split="train", *arguments):
        images = open_images(spec, split, *arguments)
        looks[split] = images.range, images.exif
        return images

    monkeypatch.setattr(data, "open_images", spy)
    monkeypatch.setattr("common.engine.held_out.open_images", spy)
    for script, *words in ((eval_knn,), (eval_cluster,), (eval_cluster, "--training"),
                           (eval_cluster, "--images", root / "val", "--sort-into", tmp_path / "sorted"),
                           (eval_cluster, "--kmeans", 2), (eval_linear, "--cache", "--epochs", 1),
                           (eval_cluster, "--kmeans", 2, "--data", root, "--images", root / "val"),
                           (eval_linear, "--head", tmp_path / "eval_linear_small_cached_classifier.pt"),
                           (eval_semisup, "--data", root, "--fraction", 1, "--batch-size", 4, "--epochs", 1,
                            "--size", 32, "--resize", 32)):
        looks.clear()
        evaluate(capsys, script, out, *words, *CPU, *([] if script is eval_knn else ["--out", tmp_path]))
        assert looks and set(looks.values()) == {(found, True)}, (script.__name__, words)
    looks.clear()

    def voc(spec, look):
        looks[spec] = look
        raise DataError("that is enough")

    monkeypatch.setattr(eval_svm, "Voc", voc)
    assert run_here(eval_svm, out, "--data", "VOC", "--layers", "avgpool", *CPU) == 3
    assert looks.pop("VOC") == (found, True)
    launch(main, arguments([str(out), "--features", str(root / "val"), "--out", str(tmp_path / "f.npz")]))
    assert looks == {"": (found, True)}
    kept = json.loads(str(np.load(tmp_path / "f.npz")["info"]))
    assert (tuple(kept["range"]), kept["exif"]) == (found, True)


def test_another_projects_trunk_sees_the_range_of_the_set(tmp_path, capsys, monkeypatch):
    root, trunk = scans(tmp_path / "scans"), export(tmp_path / "backbone.pt")
    seen = []
    monkeypatch.setattr("common.evaluation.protocol.match_classes", lambda *both: seen.extend(both))
    evaluate(capsys, eval_knn, trunk, "--data", root, "--k", 3, *CPU)
    images, queries = reversed(seen)
    assert images.range == queries.range == data.open_images(root).range and not images.exif
    for info in ({"range": (1, 2, 3)}, {"range": "ab"}, {"range": (0, float("nan"))}, {"exif": 1}):
        export(trunk, **info)
        refuses(capsys, eval_knn, [((trunk, "--data", root), 4, f"its {next(iter(info))} is ")])


def test_held_out_images_have_the_range_of_the_training_set(tmp_path):
    root = scans(tmp_path)
    images = data.open_images(root, range=(-5, 5), exif=True)
    (tmp_path / "list.txt").write_text("val/n0/0.tif n0\nval/n1/0.tif n1\n")
    for val in ("", root / "val", tmp_path / "list.txt"):
        config = swav.Config(data=str(root), val=str(val))
        queries = held_out(config, images)
        assert (queries.range, queries.exif) == ((-5, 5), True)
    assert open_queries(str(root), str(root / "val")).range[1] < 510  # of its own, that it must not get


def test_a_resumed_run_has_the_same_range_and_refuses_another(tmp_path, capsys):
    root = scans(tmp_path / "scans")
    words = ["--recipe", "small", "--data", root, *SMALL]
    assert swav_here(*words, "--out", tmp_path / "straight") == 0
    assert swav_here(*words, "--max-steps", 2, "--out", tmp_path / "a") == 0
    assert swav_here(*words, "--out", tmp_path / "a") == 0
    assert same(saved(tmp_path / "straight")["model"], saved(tmp_path / "a")["model"])
    ranges = [torch.load(tmp_path / name / "backbone.pt", weights_only=True)["info"]["range"]
              for name in ("straight", "a")]
    assert ranges[0] == ranges[1] != ()
    given = [*words, "--range", 100, 900, "--out", tmp_path / "given"]
    assert swav_here(*given, "--max-steps", 2) == swav_here(*given) == 0
    assert weights.load_backbone(tmp_path / "given")[1]["range"] == (100, 900)
    capsys.readouterr()
    for other, said in ((("--range", -0.5, 7), "--range -0.5 7 (saved )"), (("--no-exif",),
                                                                           "--exif False (saved True)")):
        assert swav_here(*words, *other, "--out", tmp_path / "a") == 4
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_run_older_than_the_options_goes_on_without(tmp_path, capsys):
    """Its recipe turns images upright now: the line that says so names what to type."""
    root = image_tree(tmp_path / "photos")
    words = ["--recipe", "small", "--data", root, *SMALL, "--out", tmp_path / "old"]
    assert swav_here(*words, "--no-exif", "--max-steps", 2) == 0
    state = saved(tmp_path / "old")
    del state["config"]["exif"], state["config"]["range"]
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    assert swav_here(*words) == 4 and "--exif True (saved False)" in capsys.readouterr().err
    assert swav_here(*words, "--no-exif") == 0


def test_recipes_and_options():
    for method in ("swav", "deepclusterv2", "selav2", "deepcluster", "sela", "odc"):
        script = __import__(method)
        looks = {name: recipe(script.Config, script.RECIPES, name).exif for name in script.RECIPES}
        assert [name for name, exif in looks.items() if exif] == ["small"]
    for given in ((1.0,), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0, 2.0), (0.0, float("nan"))):
        config = recipe(swav.Config, swav.RECIPES, "small")
        config.range = given
        with pytest.raises(ArgumentError, match="--range"):
            check(config, 1)
