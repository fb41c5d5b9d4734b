"""Released checkpoints by name, downloaded from a server on this computer."""

import hashlib
import http.server
import io
import threading
import time
import zipfile

import pytest
import torch
from helpers import image_tree
from test_checkpoint import deepclusterv2_released, mmselfsup_odc, sela_released, swav_released, thin

import hubconf
from benchmarks import verify
from common import weights
from common.engine.errors import CheckpointError
from common.engine.launch import launch
from common.resnet import resnet18
from common.weights import __main__ as tool
from common.weights import released
from common.weights.released import PROJECTS, RELEASED, Released


def packed(saved):
    content = io.BytesIO()
    torch.save(saved, content)
    return content.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """{path: bytes, or a function that answers} that are served; what was asked for is in .asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.asked.append((self.command, self.path))
            if callable(content := found.get(self.path)):
                return content(self)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", len(content or b""))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    class Files(dict):
        def offer(self, name, url="", **about):
            monkeypatch.setitem(RELEASED, name, Released(self.base + url, "75.3", **about))

    found, listening = Files(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.base, found.asked = f"http://127.0.0.1:{listening.server_port}", []
    monkeypatch.setitem(PROJECTS, found.base, ("a/project", "a licence", ["SwAV"]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield found
    listening.shutdown()
    listening.server_close()


def refused(name, *words):
    with pytest.raises(CheckpointError) as error:
        weights.load_backbone(f"released:{name}")
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_a_released_file_is_downloaded_once_and_verified(server, capsys):
    saved, trunk, _ = swav_released()
    server["/swav.pth.tar"] = packed(saved)
    server.offer("swav_try", "/swav.pth.tar", sha256=hashlib.sha256(server["/swav.pth.tar"]).hexdigest()[:8])
    for _ in range(2):
        found, info = weights.load_backbone("released:swav_try")
        assert torch.equal(found.layer4[2].conv3.weight, trunk.layer4[2].conv3.weight)
    assert info["method"] == "SwAV" and server.asked == [("HEAD", "/swav.pth.tar"), ("GET", "/swav.pth.tar")]
    assert capsys.readouterr().out.count("released:swav_try is a/project's, licence a licence: http://") == 1
    model, _ = weights.load_model("released:swav_try")
    assert len(model.heads) == 1
    tool.main(tool.arguments(["released:swav_try"]))
    assert "sha256" in capsys.readouterr().out


def test_a_member_of_a_zip(server):
    saved = swav_released()[0]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("models/a.pth", packed(saved))
    server["/models.zip"] = content.getvalue()
    server.offer("sela_try", "/models.zip", member="models/a.pth")
    assert weights.load_backbone("released:sela_try")[1]["width"] == 0.125
    server.offer("sela_other", "/models.zip", member="models/b.pth")
    refused("sela_other", "cannot be had", "models/b.pth")


def test_what_does_not_come_whole_is_not_kept(server, tmp_path):
    content = packed(swav_released()[0])

    def cut_short(answer):
        answer.send_response(200)
        answer.send_header("Content-Length", len(content))
        answer.end_headers()
        if answer.command == "GET":
            answer.wfile.write(content[:1000])

    server.update({"/cut": cut_short, "/whole": content})
    for name, about in {"cut": {}, "missing": {}, "whole": dict(sha256="00000000")}.items():
        server.offer(name, f"/{name}", **about)
    refused("cut", "released:cut cannot be had from http://127", f"of {len(content)} bytes came", "put it at")
    refused("missing", "404")
    refused("whole", "invalid hash value", "00000000")
    server.base = "http://127.0.0.1:1"  # where nobody listens: as without a network
    server.offer("cut", "/cut")
    PROJECTS[server.base] = PROJECTS[next(iter(PROJECTS))]
    refused("cut", "refused")
    del PROJECTS[server.base]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_server_that_falls_silent_is_given_up(server, monkeypatch):
    began = time.monotonic()
    monkeypatch.setattr(released.socket, "setdefaulttimeout",
                        lambda seconds, own=released.socket.setdefaulttimeout: own(seconds and 0.2))
    server["/silent"] = lambda answer: time.sleep(20)
    server.offer("silent", "/silent")
    refused("silent", "timed out")
    assert time.monotonic() - began < 10


def test_names_caches_and_files_that_cannot_be_used(server, tmp_path, monkeypatch):
    refused("swav_801ep", "released:swav_801ep is not known", "--list")
    with pytest.raises(CheckpointError, match="swav_800ep does not exist, is released:swav_800ep meant"):
        weights.load_backbone("swav_800ep")
    server["/other"] = packed({"state_dict": thin().state_dict()})
    server.offer("swav_try", "/other")
    refused("swav_try", "is a file of torchvision, where released:swav_try is one of SwAV: delete it")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    refused("swav_try", "cannot be had", "Not a directory")


def test_the_hub_fills_torchvisions_network(server, monkeypatch):
    trunk = resnet18()
    server["/trunk"] = packed(trunk.state_dict())
    server.offer("torchvision_try", "/trunk")
    monkeypatch.setitem(PROJECTS, server.base, ("a/project", "a licence", ["torchvision"]))
    network = hubconf.resnet18("released:torchvision_try")
    assert torch.equal(network.layer4[1].conv2.weight, trunk.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="torchvision_try is no resnet50 of torchvision: resnet18 x1"):
        hubconf.resnet50("released:torchvision_try")


def test_released_weights_are_measured_beside_what_is_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache/hub/checkpoints/deepclustering"
    cache.mkdir(parents=True)
    trunk = swav_released()[0]
    head = {"module.linear.weight": torch.randn(3, 256), "module.linear.bias": torch.zeros(3)}
    files = {"swav_800ep.tar": trunk, "swav_800ep_linear.tar": {"state_dict": head},
             "deepclusterv2_800ep.tar": deepclusterv2_released()[0], "odc_440ep.pth": mmselfsup_odc()[0],
             "sela_resnet50_10x3k.pth": sela_released()[0]}
    for name, saved in files.items():
        torch.save(saved, cache / name)
    images = image_tree(tmp_path / "images", classes=3, images=11, size=(40, 40))
    launch(verify.main, verify.arguments(["--data", str(images), "--workers", "0"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "33 images to vote, 33 to judge by; top-1 in percent" and len(lines) == 6
    rows = [(row.split()[0], row.rpartition("published")[2].strip()) for row in lines[1:]]
    assert rows == [("swav_800ep", "75.3"), ("swav_800ep", "65.7"), ("deepclusterv2_800ep", "67.1"),
                    ("odc_440ep", "39.1"), ("sela_resnet50_10x3k", "")] and "not published" in lines[-1]
    launch(verify.main, verify.arguments(["--data", str(images), "--workers", "0", "--limit", "30"]))
    assert "30 images to vote, 30 to judge by" in capsys.readouterr().out
    (cache / "odc_440ep.pth").write_bytes(b"cut short")
    with pytest.raises(SystemExit) as stopped:
        launch(verify.main, verify.arguments(["--data", str(images), "--workers", "0", "--limit", "30"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 4 and "odc_440ep.pth cannot be loaded" in error and error.count("\n") == 1


def test_the_list_names_every_file_with_its_licence():
    with pytest.raises(SystemExit) as stopped:
        tool.arguments(["--list"])
    assert stopped.value.code == 0
    lines = released.table().splitlines()
    assert len(lines) == 3 * len(RELEASED) + 3 and lines[0] == "released:swav_800ep"
    assert lines[1:3] == ["    75.3 (facebookresearch/swav, CC BY-NC 4.0)",
                          f"    {released.SWAV}/swav_800ep_pretrain.pth.tar"]
    for name, file in RELEASED.items():  # what a file's name says of its hash
        assert file.sha256 is None or file.url.endswith(f"-{file.sha256}.pth"), name
        assert all(file.project)
    assert all(RELEASED[name].project[2] == ["DeepCluster-v2 or SeLa-v2"] for name in RELEASED
               if name.startswith(("deepclusterv2", "selav2")))
    assert RELEASED["deepcluster_alexnet"].project[2] == ["DeepCluster"]
