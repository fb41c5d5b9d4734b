"""eval_cluster.py: its figures against other people's, and the script from the outside."""

import csv
import itertools
import json
import shutil
import types

import numpy as np
import pytest
import torch
from evaluations import COLOURS, CPU, INFO, evaluate, export, refuses, run_here
from helpers import TINY, golden, image_tree, ranks, swav_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import eval_cluster
from common import data, features, weights
from common.engine.errors import Diverged
from common.engine.log import mutual_information
from common.evaluation import metrics as agreement
from common.evaluation.metrics import ami, ari, hungarian_accuracy, nmi, purity
from common.multicrop import MEAN, STD

# ---- the metrics


def test_scikit_learns_numbers():
    numbers = golden("cluster_metrics")
    for i in range(int(numbers["n_pairs"])):
        a, b = numbers[f"a_{i}"], numbers[f"b_{i}"]
        found = {"nmi": nmi(a, b), "ami": ami(a, b), "ari": ari(a, b)}
        found["nmi_geometric"] = nmi(a, b, geometric=True)
        assert found == pytest.approx({name: float(numbers[name][i]) for name in found}, abs=1e-9), i


labellings = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-3, 6), min_size=n, max_size=n)] * 2))


@settings(max_examples=50, deadline=None)
@given(labellings)
def test_metrics_agree_with_scikit_learn_whatever_the_labels(pair):
    from sklearn import metrics

    a, b = pair
    assert nmi(a, b) == pytest.approx(metrics.normalized_mutual_info_score(a, b), abs=1e-9)
    assert ari(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b), abs=1e-9)
    _, h_a, h_b, *sizes = mutual_information(a, b)
    if abs((h_a + h_b) / 2 - agreement.expected_information(*sizes)) > 1e-9:
        assert ami(a, b) == pytest.approx(metrics.adjusted_mutual_info_score(a, b), abs=1e-9)
    # Names do not matter; all but purity are symmetric.
    renamed = [{value: -value * 10**12 for value in a}[value] for value in a]
    for metric in (nmi, ami, ari, hungarian_accuracy, purity):
        assert metric(renamed, b) == pytest.approx(metric(a, b), abs=1e-12)
        assert metric(a, a) == pytest.approx(1)
        assert metric is purity or metric(b, a) == pytest.approx(metric(a, b), abs=1e-12)


def test_expected_information_of_many_images_leaves_out_nothing_that_counts():
    from sklearn.metrics.cluster import expected_mutual_information

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 12, 20_000) ** 2, rng.geometric(0.05, 20_000)
    *_, size_a, size_b = mutual_information(a, b)
    expected = expected_mutual_information(agreement.contingency(a, b).tocsr(), 20_000)
    assert agreement.expected_information(size_a, size_b) == pytest.approx(expected, rel=1e-9)


def test_random_labels_have_a_high_nmi_and_no_ami():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 1000, 50_000), rng.integers(0, 1000, 50_000)
    assert nmi(a, b) == pytest.approx(0.435, abs=0.002)
    assert abs(ami(a, b)) < 0.001 and abs(ari(a, b)) < 0.001


def test_hungarian_accuracy_is_the_best_one_to_one_matching():
    rng = np.random.default_rng(1)
    for clusters, classes in ((3, 5), (5, 3), (4, 4)):
        a, b = rng.integers(0, clusters, 60), rng.integers(0, classes, 60)
        counts = agreement.contingency(a, b).toarray()
        counts = counts if clusters <= classes else counts.T
        best = max(sum(counts[i, j] for i, j in enumerate(order))
                   for order in itertools.permutations(range(counts.shape[1]), len(counts)))
        assert hungarian_accuracy(a, b) == best / 60
    # Five clusters of two classes: two of them find a class, purity counts all.
    pair = [0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 1, 1]
    assert hungarian_accuracy(*pair) == 3 / 6 and purity(*pair) == 1


def test_labellings_of_different_items_are_refused():
    for a, b in (([1, 2], [1, 2, 3]), ([], []), ([[1]], [[1]])):
        for metric in (ari, hungarian_accuracy, purity):
            with pytest.raises(ValueError, match="of the same items"):
                metric(a, b)


# ---- a model whose heads are known


class Colours(nn.Module):
    """Two heads: that of the strongest channel, and one that knows red alone."""

    def __init__(self, heads=2):
        super().__init__()
        self.backbone, self.projection_head = nn.AdaptiveAvgPool2d(1), None
        self.heads = nn.ModuleList(nn.Linear(3, k) for k in (3, 5)[:heads])
        red = torch.zeros(5, 3)
        red[1, :2] = torch.tensor([1.0, -1])
        for head, rows, bias in zip(self.heads, (torch.eye(3), red), ([0.0] * 3, [0, 0, -9.0, -9, -9])):
            head.weight.data.copy_(rows)
            head.bias.data.copy_(torch.tensor(bias))

    def forward(self, images):
        return [head(self.backbone(images).flatten(1)) for head in self.heads]


class Plain:
    """N images of one colour each, without files: red, green and blue in turn."""

    classes = ("red", "green", "blue")

    def __init__(self, n):
        self.labels = torch.arange(n) % 3
        self.paths = [f"{i}.png" for i in range(n)]
        self.fingerprint = f"{n} plain"

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        colour = [60, 60, 60]
        colour[i % 3] += 100 + i % 60
        return Image.new("RGB", (8, 8), tuple(colour))


OF_COLOURS = {**INFO, "method": "colours", "resize": 8, "size": 8}


def of_colours(out, n, *arguments, heads=2):
    """Runs the script on the model above and N images; returns the record and the page that it wrote."""
    load, images = weights.load_model, eval_cluster.open_queries
    weights.load_model = lambda *_: (Colours(heads), OF_COLOURS)
    eval_cluster.open_queries = lambda *_: Plain(n)
    try:
        command = ("colours.pt", "--data", "shapes", *CPU, "--out", out, *arguments)
        eval_cluster.main(eval_cluster.arguments([str(a) for a in command]))
    finally:
        weights.load_model, eval_cluster.open_queries = load, images
    return json.loads((out / "eval_cluster.json").read_text()), (out / "gallery.html").read_bytes()


def test_known_heads_have_known_scores(tmp_path, capsys):
    record, page = of_colours(tmp_path, 300, "--head", 1)
    first, second = record["heads"]
    assert [first[name] for name in eval_cluster.METRICS] == pytest.approx([100] * 5)
    assert (first["used"], first["clusters"], second["used"], second["clusters"]) == (3, 3, 2, 5)
    # Red in one cluster, green and blue together in the other: two of three images are matched, one to one.
    assert second["hungarian"] == second["purity"] == pytest.approx(200 / 3)
    entropies = np.log(3), -np.log(1 / 3) / 3 - 2 * np.log(2 / 3) / 3
    assert second["nmi"] == pytest.approx(100 * entropies[1] / np.mean(entropies))
    assert record["mean"]["purity"] == pytest.approx(250 / 3)
    assert abs(first["chance"]["ami"]) < 3 and 33 < first["chance"]["purity"] < 45
    out = capsys.readouterr().out
    assert "300 held-out images, clusters by the heads" in out and f"{'head 1':8}{'2 of 5':>16}" in out
    assert f"{'mean':24}" in out and f"{'chance':24}" in out
    assert b"head 1 of 2" in page
    assert "\nwarning: of 8 clusters 3 have none of these images, 2 are copies of others\n" in out
    of_colours(tmp_path, 300, heads=1)
    assert "warning" not in capsys.readouterr().out


def test_copies_of_prototypes():
    head = nn.Linear(2, 4, bias=False)
    head.weight.data.copy_(torch.tensor([[3.0, 4], [-3, -4], [0.6, 0.8], [0, 1]]))
    assert eval_cluster.copies(head) == 1
    head.weight.data[2] = head.weight.data[0]
    biased = nn.Linear(2, 4)
    biased.weight.data.copy_(head.weight)
    biased.bias.data.copy_(torch.tensor([0.0, 0, 1, 0]))
    assert (eval_cluster.copies(head), eval_cluster.copies(biased)) == (1, 0)


def test_each_head_has_its_own_cluster_and_score(tmp_path):
    how = dict(resize=8, size=8, device=torch.device("cpu"))
    clusters, scores = eval_cluster.by_heads(eval_cluster.Assign(Colours()), Plain(7), how)
    assert clusters.tolist() == [[0, 1, 2, 0, 1, 2, 0], [1, 0, 0, 1, 0, 0, 1]]
    strength = [((160 + i) / 255 - MEAN[i % 3]) / STD[i % 3] for i in range(7)]
    other = [(60 / 255 - MEAN[1]) / STD[1], 0]  # red less green, or nothing
    assert scores[0] == pytest.approx(strength, abs=1e-5)
    assert scores[1] == pytest.approx([0 if i % 3 else strength[i] - other[0] for i in range(7)], abs=1e-5)
    eval_cluster.write_csv(tmp_path / "clusters.csv", Plain(7), clusters, scores)
    header, first, *_ = csv.reader((tmp_path / "clusters.csv").read_text().splitlines())
    assert header == ["path", "head0", "score0", "head1", "score1"]
    assert first == ["0.png", "0", f"{scores[0, 0]:.6g}", "1", f"{scores[1, 0]:.6g}"]


def test_two_processes_find_what_one_finds(tmp_path):
    one = of_colours(tmp_path, 4999)
    assert one[0]["count"] == 4999 and one[0]["heads"][0]["purity"] == 100
    assert ranks(2, of_colours, tmp_path, 4999) == [one, one]


def test_a_score_that_is_no_number_is_an_error(tmp_path, monkeypatch):
    forward = Colours.forward
    monkeypatch.setattr(Colours, "forward", lambda *x: [scores * float("nan") for scores in forward(*x)])
    with pytest.raises(Diverged, match=r"not finite, 30 of 30: '0.png', '1.png', '2.png'; the weights"):
        of_colours(tmp_path, 30)


# ---- a run, and its files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "swav"
    assert swav_here("--data", "shapes:100", *TINY, "--epochs", 1, "--out", out) == 0
    return out


def test_held_out_images_by_the_heads_of_a_run(run, capsys):
    record, _ = evaluate(capsys, eval_cluster, run, *CPU)
    wanted = {"method": "swav", "images": "held-out images", "count": 20, "unassigned": 0}
    assert {key: record[key] for key in wanted} == wanted
    model, info = weights.load_model(run)

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)[0]

    images = data.open_images("shapes:100", "val")
    rows, labels = features.extract(Scores(), images, info["resize"], info["size"], torch.device("cpu"))
    clusters = rows.argmax(dim=1)
    assert record["heads"][0]["nmi"] == pytest.approx(100 * nmi(clusters, labels))
    assert record["heads"][0]["used"] == len(clusters.unique()) and record["heads"][0]["clusters"] == 12
    assert json.loads((run / "eval_cluster.json").read_text()) == record
    assert "Clusters of 20 held-out images" in (run / "gallery.html").read_text()


def test_training_images_as_the_run_has_them(run, capsys):
    record, _ = evaluate(capsys, eval_cluster, run, "--training", "--workers", 0)
    clusters = np.load(run / "assignments.npz")["assignments"][0]
    seen = clusters >= 0
    wanted = {"images": "training images", "clusters_by": "assignments.npz", "count": 100, "unassigned": 4}
    assert {key: record[key] for key in wanted} == wanted
    assert (~seen).sum() == 4  # 6 batches of 16
    assert record["heads"][0]["ari"] == pytest.approx(100 * ari(clusters[seen], np.arange(100)[seen] % 10))
    page = (run / "gallery_training.html").read_text()
    page = json.loads(page[page.index('id="data">') + 10 :].partition("</script>")[0])
    assert sum(c["size"] for c in page["clusters"]) == 96
    for c in page["clusters"]:
        shown = [int(name.rpartition("/")[2]) for _, name, *_ in c["typical"] + c["random"]]
        assert all(clusters[i] == c["id"] for i in shown)
        assert len(set(shown)) == len(shown) == min(len(c["typical"]) + 12, c["size"])
    # The heads' own opinion says what is typical, where it is that of the run.
    assert any(c["typical"] for c in page["clusters"])
    scores = [t[3] for t in page["clusters"][0]["typical"]]
    assert scores == sorted(scores, reverse=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three colours under noise, and a trunk that need not be trained to tell them apart."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(colour, 8, (24, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    export(root / "backbone.pt", resize=20)
    return root


def test_kmeans_on_pooled_features(photos, tmp_path, capsys, monkeypatch):
    fitted, kmeans = [], eval_cluster.kmeans
    monkeypatch.setattr(eval_cluster, "kmeans", lambda x, *a, **k: (fitted.append(x), kmeans(x, *a, **k))[1])
    command = (eval_cluster, photos / "backbone.pt", "--data", photos, "--kmeans", 3, "--seed", 2, *CPU,
               "--out", tmp_path)
    record, _ = evaluate(capsys, *command)
    assert (record["count"], record["clusters_by"]) == (15, "k-means on training features")
    assert record["heads"][0]["nmi"] == pytest.approx(100)  # colours are easy
    torch.testing.assert_close(fitted[0].norm(dim=1), torch.ones(36))  # the training images, at unit length
    record, _ = evaluate(capsys, *command, "--training")
    assert record["count"] == 36 and (tmp_path / "gallery_training_kmeans.html").exists()
    assert run_here(*command, "--kmeans", 37) == 2
    assert "--kmeans 37 needs as many images" in capsys.readouterr().err


def test_new_images_without_labels(photos, tmp_path, capsys):
    folder, out = tmp_path / "new", tmp_path / "out"
    shutil.copytree(photos / "val" / "red", folder)
    for path in (photos / "val" / "green").glob("*.png"):
        shutil.copy(path, folder / f'green, "{path.name}')
    (folder / "9.png").write_text("no image")
    _, said = evaluate(capsys, eval_cluster, photos / "backbone.pt", "--images", folder, "--kmeans", 2, *CPU,
                       "--out", out)
    assert "11 images of" in said and "warning: 1 images cannot be read" in said and "NMI" not in said
    with open(out / "clusters_kmeans.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "head0", "score0"]
    assert [row[0] for row in rows] == list(data.open_images(folder).paths)
    found = {name: (int(cluster), score) for name, cluster, score in rows}
    assert found.pop("9.png") == (-1, "")
    green = {cluster for name, (cluster, _) in found.items() if name.startswith("green")}
    red = {cluster for name, (cluster, _) in found.items() if not name.startswith("green")}
    assert len(green) == len(red) == 1 and green != red and green | red == {0, 1}
    assert all(float(score) <= 0 for _, score in found.values())
    assert (out / "gallery_images_kmeans.html").exists()


def test_new_images_by_the_heads(run, photos, tmp_path, capsys):
    _, out = evaluate(capsys, eval_cluster, run, "--images", photos / "val", "--workers", 0,
                      "--out", tmp_path, "--samples", 0)
    assert "NMI" in out  # the folder has classes
    assert len((tmp_path / "clusters.csv").read_text().splitlines()) == 16
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_images_are_sorted_into_folders(photos, copy, tmp_path, capsys):
    folder, out = photos / "val", tmp_path / "sorted"
    command = (photos / "backbone.pt", "--images", folder, "--kmeans", 3, *CPU, "--out", tmp_path,
               "--samples", 0, "--sort-into", out, *copy)
    _, said = evaluate(capsys, eval_cluster, *command)
    assert f"sorted: {out}, a folder for each of 3 clusters" in said
    with open(tmp_path / "clusters_kmeans.csv", newline="") as file:
        rows = [(path, int(cluster), float(score)) for path, cluster, score in list(csv.reader(file))[1:]]
    for cluster in range(3):
        wanted = sorted((row for row in rows if row[1] == cluster), key=lambda row: -row[2])
        found = sorted((out / str(cluster)).iterdir())
        assert [path.name[3:] for path in found] == [path.rpartition("/")[2] for path, *_ in wanted]
        assert all(path.is_symlink() == (not copy) for path in found)
        assert [path.read_bytes() for path in found] == [(folder / path).read_bytes() for path, *_ in wanted]
    refuses(capsys, eval_cluster, [(command, 2, f"--sort-into {out} exists")])


def test_one_image(photos, tmp_path, capsys):
    _, said = evaluate(capsys, eval_cluster, photos / "backbone.pt", "--images", photos / "val/red/0.png",
                       "--kmeans", 1, *CPU, "--out", tmp_path)
    assert "1 images of" in said and "0.png: cluster 0 of 1 head\n" in said
    assert (tmp_path / "clusters_kmeans.csv").read_text().splitlines()[1].startswith("0.png,0,")


def test_errors(run, photos, tmp_path, capsys):
    image_tree(tmp_path / "one", classes=1)
    image_tree(tmp_path / "others", classes=2, images=50, size=(8, 8))
    empty, foreign, torn, bare = (tmp_path / name for name in ("empty", "foreign", "torn", "bare"))
    odd = {f"odd{i}": content for i, content in enumerate((
        '{"data": 5}', '{"data": ["a"], "prototypes": 5}', '{"root": {}}', '{"prototypes": "x"}', "[1]", "5",
        "null", "{", "[" * 9999, "\udcff"))}
    for copy in (empty, foreign, torn, bare, *(tmp_path / name for name in odd)):
        shutil.copytree(run, copy)
    for name, content in odd.items():
        (tmp_path / name / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    (foreign / "config.json").write_text('{"data": "shapes:100"}')
    with np.load(run / "assignments.npz") as file:
        np.savez(empty / "assignments.npz", assignments=np.full((1, 100), -1), paths=file["paths"])
    (torn / "assignments.npz").write_bytes(b"PK")
    (bare / "assignments.npz").unlink()
    (tmp_path / "file").touch()
    trunk = photos / "backbone.pt"
    cases = (
        ((trunk, "--data", photos), 4, "has no heads to cluster with: --kmeans K"),
        ((trunk, "--kmeans", 3), 2, "--data is needed"),
        (("runs/nowhere",), 4, "runs/nowhere does not exist"),
        ((trunk, "--data", photos, "--training"), 4, "--training needs the directory of one"),
        ((trunk, "--data", photos, "--random-init"), 2, "--random-init needs --kmeans"),
        ((run, "--head", 1), 2, "has 1 head, numbered from 0"),
        ((run, "--head", 1, "--training"), 2, "has 1 head, numbered from 0"),
        ((run, "--head", 1, "--kmeans", 3), 2, "has 1 head, numbered from 0"),
        ((run, "--training", "--images", photos), 2, "choose one"),
        ((run, "--copy"), 2, "--copy needs --sort-into"),
        ((run, "--sort-into", tmp_path / "new"), 2, "needs images that are files"),
        ((trunk, "--images", photos, "--kmeans", 2, "--sort-into", tmp_path / "file/new"), 2,
         "file/new cannot be written: Not a directory"),
        ((run, "--images", photos, "--val", photos), 2, "--val"),
        ((run, "--training", "--val", photos), 2, "cannot be combined with --training"),
        ((run, "--images", photos, "--data", photos), 2, "not used with --images, unless --kmeans"),
        ((run, "--batch-size", 0), 2, "a batch needs at least 1 image"),
        ((run, "--kmeans", -1), 2, "nothing may be below 0"),
        ((run, "--data", photos / "val" / "red", "--training"), 3, "no labels to compare clusters with"),
        ((run, "--data", tmp_path / "one"), 3, "--val has images of 1 class (n00)"),
        ((run, "--data", tmp_path / "others", "--training"), 3, "other images: it lacks 100 of 100, such as"),
        ((run, "--data", photos, "--training"), 3, "is of other images: it lacks 36 of 36, such as"),
        ((empty, "--training"), 3, "no image has a cluster yet"),
        ((torn, "--training"), 3, "is not an assignments.npz"),
        ((foreign, "--training"), 4, "config.json cannot be used: KeyError: 'prototypes'"),
        *(((tmp_path / name, *more), 4, f"{name}/config.json cannot be used: ")
          for name in odd for more in ((), ("--training",))),
        ((run, "--size", 99), 2, "is smaller than --size 99"),
        ((trunk, "--data", photos, "--kmeans", 3, "--size", 30), 2, "--resize 20 is smaller than --size 30"),
        ((bare, "--training"), 3, "assignments.npz does not exist: a run writes it"),
        ((run, "--images", tmp_path / "nothing"), 3, "nothing does not exist"),
        ((run, "--out", tmp_path / "file" / "below"), 2, "cannot be written"),
    )
    out = ("--precision", "float32", "--out", tmp_path / "out")  # before the case's own
    refuses(capsys, eval_cluster, [((first, *out, *rest), *expected) for (first, *rest), *expected in cases])


def test_images_that_all_cannot_be_read(run, tmp_path, capsys):
    image_tree(tmp_path, images=2)
    for path in tmp_path.glob("val/*/*"):
        path.write_text("no image")
    refuses(capsys, eval_cluster, [((run, "--data", tmp_path, "--out", tmp_path), 3,
                                    "no image has both a cluster and a label")])


def test_typical_images_are_scored_where_the_heads_agree():
    scores = torch.tensor([[3.0, 0], [2, 0], [0, 5], [0, 4], [9, 0]])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return [scores[(x[:, 0, 0, 0] * STD[0] + MEAN[0]).mul(255).round().long()]]

    images = types.SimpleNamespace(labels=None, paths="abcde",
                                   read=lambda i: Image.new("RGB", (4, 4), (i, 0, 0)))
    how = dict(resize=4, size=4, device=torch.device("cpu"))
    clusters = np.array([0, 0, 1, 1, 1])  # the heads have the last one in cluster 0
    all_of_them, few = (eval_cluster.typical(eval_cluster.Assign(Model()), images, clusters, 0, how, most)
                        for most in (5, 1))
    assert all_of_them.tolist() == pytest.approx([3, 2, 5, 4, np.nan], nan_ok=True)
    assert np.isfinite(few[:2]).sum() == 1 and np.isfinite(few[2:]).sum() <= 1


def test_all_of_a_folder_is_clustered_and_k_means_can_be_of_other_images(photos, tmp_path, capsys):
    command = (eval_cluster, photos / "backbone.pt", "--images", photos, "--kmeans", 3, "--seed", 2, *CPU,
               "--samples", 0, "--out", tmp_path)
    assert f"{36 + 15} images of" in evaluate(capsys, *command)[1]  # train/ and val/
    assert "k-means on training features" in evaluate(capsys, *command, "--data", photos)[1]
