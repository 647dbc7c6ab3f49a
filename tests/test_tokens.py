"""Proves: studies.tokens splits the length of patch tokens as computed by hand, and measures each block after
the final norm."""
import pytest
import torch

import data
import run
from model import vit
from studies import tokens


def test_shares_by_hand():
    """Two images of two tokens.  Mean (2, 0), images' means (2, 1) and (2, -1), tokens 1 away from them."""
    z = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[3.0, -1.0], [1.0, -1.0]]])
    assert tokens.shares(z) == {                       # of 6: 4, 1 and 1
        "common": pytest.approx(66.67),
        "between": pytest.approx(16.67),
        "within": pytest.approx(16.67),
    }


def test_shares_add_up_and_equal_tokens_have_nothing_but_what_is_common():
    z = torch.randn(5, 9, 16) + 0.3
    assert sum(tokens.shares(z).values()) == pytest.approx(100, abs=0.02)
    same = torch.randn(1, 1, 16).expand(5, 9, 16)
    assert tokens.shares(same) == {"common": 100.0, "between": 0.0, "within": 0.0}


def test_the_last_block_is_what_the_network_gives():
    torch.manual_seed(0)
    network = vit("vit_micro", img_size=24, patch_size=8).eval()
    images = data.ToyImages("val", 4, size=24)
    found = tokens.shares_of_blocks(network, images, [0, 1, 2, 3], 24, torch.device("cpu"))
    assert list(found) == [1, 2, 3, 4]
    crops = data.CentreCrop(images, 24)
    x = tokens.normalize(torch.stack([crops[i][0] for i in range(4)]))
    with torch.no_grad():
        z = network(x)[:, 1:]
    assert found[4] == pytest.approx(tokens.shares(z), abs=0.02)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "tokens.jsonl"
    args = tokens.get_args(["--ckpt", "random:vit_micro/8", "--data", "toy", "--size", "24", "--limit", "3",
                            "--json", str(file)])
    tokens.main(args)
    metrics = run.read_lines(file)[-1]["metrics"]
    assert sum(metrics["4"].values()) == pytest.approx(100, abs=0.02)
    assert "| within an image |" in capsys.readouterr().out
