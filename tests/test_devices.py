"""Device names: every command and class refuses unsupported ones, and the message lists valid ones."""

import pytest
import torch
from PIL import Image

from conddetr import Detector
from conddetr.cli import main
from conddetr.devices import find_device


@pytest.fixture
def gpus(monkeypatch):
    """Makes PyTorch report `count` GPUs."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


def test_available_devices_are_found_by_name(gpus):
    gpus(0)
    assert [find_device(name) for name in (None, "", "cpu", torch.device("cpu"))] == [torch.device("cpu")] * 4
    gpus(2)
    assert find_device() == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "gpu", "CPU", "cuda:x", "cuda:-1", "cuda:2", "cpu:1"])
@pytest.mark.parametrize("count", [0, 2])
def test_unavailable_devices_are_refused(gpus, name, count):
    gpus(count)
    cuda = "cuda or cuda:0 to cuda:1" if count else "or cuda, which this machine lacks"
    with pytest.raises(ValueError, match=rf"^device: expected cpu, {cuda}.*, got '{name}'\.$"):
        find_device(name)


def test_every_command_refuses_cuda_without_a_gpu(gpus, tmp_path, capsys):
    gpus(0)
    with pytest.raises(ValueError, match="got 'cuda'"):
        Detector("conditional-detr-tiny", device="cuda")
    with pytest.raises(ValueError, match="got 'cuda'"):
        Detector.from_checkpoint(tmp_path / "absent.pt", device="cuda")
    image = str(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(image)
    for command in (
        ["train", "--train-images", "8", "--out", str(tmp_path / "run")],
        ["eval", "--checkpoint", "absent.pt"],
        ["predict", image, "--checkpoint", "absent.pt"],
        ["attention", image, "--checkpoint", "absent.pt"],
        ["demo", "--out", str(tmp_path / "demo")],
        ["env"],
    ):
        assert main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr().err.startswith(f"conddetr {command[0]}: device: expected cpu, ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
