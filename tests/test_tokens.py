"""Proves: studies.tokens splits the length of patch tokens as computed by hand, measures each block after the
final norm, and leaves out what cannot be read."""
import pytest
import torch

import data
import run
from images import BadImage, Unreadable, normalize
from model import vit
from studies import tokens

CPU = torch.device("cpu")


def shares(z):
    """Of all tokens (n, N, D)."""
    return tokens.shares(z.mean(1), z.pow(2).sum(-1).mean(1))


def test_shares_by_hand():
    """Two images of two tokens.  Mean (2, 0), images' means (2, 1) and (2, -1), tokens 1 away from them."""
    z = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[3.0, -1.0], [1.0, -1.0]]])
    assert shares(z) == {                              # of 6: 4, 1 and 1
        "common": pytest.approx(66.67),
        "between": pytest.approx(16.67),
        "within": pytest.approx(16.67),
    }


def test_shares_are_the_variances_and_equal_tokens_have_only_what_is_common():
    z = torch.randn(5, 9, 16, dtype=torch.double) + 0.3
    within = (z - z.mean(1, keepdim=True)).pow(2).sum(-1).mean() / z.pow(2).sum(-1).mean()
    found = shares(z)
    assert found["within"] == pytest.approx(100 * within.item(), abs=0.01)
    assert sum(found.values()) == pytest.approx(100, abs=0.02)
    same = torch.randn(1, 1, 16, dtype=torch.double).expand(5, 9, 16)
    assert shares(same) == pytest.approx({"common": 100.0, "between": 0.0, "within": 0.0}, abs=0.01)


def test_each_block_after_the_final_norm():
    torch.manual_seed(0)
    network = vit("vit_micro", img_size=24, patch_size=8).eval()
    images = data.ToyImages("val", 4, size=24)
    found = tokens.shares_of_blocks(network, images, [0, 1, 2, 3], 24, CPU, Unreadable(4, 0.0))
    assert list(found) == [1, 2, 3, 4]
    crops = data.CentreCrop(images, 24)
    x = normalize(torch.stack([crops[i][0] for i in range(4)]))
    with torch.no_grad():
        last = network(x)
        second, = network.intermediate(x, [2], norm=True)
    assert found[4] == pytest.approx(shares(last[:, 1:]), abs=0.02)
    assert found[2] == pytest.approx(shares(second[:, 1:]), abs=0.02)


def test_what_cannot_be_read_is_left_out_or_ends_it(tmp_path):
    network = vit("vit_micro", img_size=24, patch_size=8).eval()
    good = data.ToyImages("val", 1, size=24)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    images = data.ImageFolder(tmp_path)
    with pytest.raises(BadImage, match="none of the 2 images can be read"):
        tokens.shares_of_blocks(network, images, [0, 1], 24, CPU, Unreadable(2, 1.0))
    with pytest.raises(run.Mistake, match="more than --max_bad"):
        tokens.shares_of_blocks(network, images, [0, 1], 24, CPU, Unreadable(2, 0.1))

    both = type("Both", (), {"labels": None, "name": str, "read": lambda _, i: (good, images)[i].read(0)})()
    unreadable = Unreadable(2, 1.0)
    found = tokens.shares_of_blocks(network, both, [0, 1], 24, CPU, unreadable)
    assert found == tokens.shares_of_blocks(network, good, [0], 24, CPU, Unreadable(1, 0.0))
    assert unreadable.names == ["1"]


def test_the_table_by_hand():
    def line(ckpt, common):
        last = {"common": common, "between": 30.0, "within": 70.0 - common}
        return {"ckpt": ckpt, "metrics": {"blocks": {"9": {}, "10": last}}}

    lines = [line("111_0/b.pth", 20.0), line("a/111_1/b.pth", 22.0), line("011_0/b.pth", 40.0)]
    assert tokens.table(lines).splitlines()[2:] == [
        "| 111 | 21.0 +- 1.4 | 30.0 +- 0.0 | 49.0 +- 1.4 |",
        "| 011 | 40.0 | 30.0 | 30.0 |"]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "tokens.jsonl"
    args = tokens.get_args(["--ckpt", "random:vit_micro/8", "--data", "toy", "--size", "24", "--limit", "3",
                            "--json", str(file)])
    tokens.main(args)
    metrics = run.read_lines(file)[-1]["metrics"]
    assert sum(metrics["blocks"]["4"].values()) == pytest.approx(100, abs=0.02)
    assert "| within an image, % |" in capsys.readouterr().out
