"""For torch.hub: encoders as modules, (B, 3, H, W) normalised pixels -> (B, T, D) tokens.

    vit = torch.hub.load(DIR, "mmc_mini", source="local")             # our small network: mmc.pth in DIR
    vit = torch.hub.load(DIR, "load", "dino.pth", source="local")     # any file that load_backbone reads

DIR is a clone of this repository.  tokens[:, 0] is CLS, tokens[:, vit.num_prefix_tokens:] are the patches."""
import pathlib

import checkpoint

dependencies = ["torch", "numpy", "tqdm"]


def load(path: str, checkpoint_key: str | None = None, num_heads: int | None = None):
    """The encoder in a checkpoint of any method, in eval mode, without gradients; prints where it is from."""
    vit, report = checkpoint.load_backbone(path, checkpoint_key, num_heads)
    print(report)
    return vit


def mmc_mini():
    """Our small network, trained with MMC.  Raises Mistake where mmc.pth is not beside this file."""
    return load(str(pathlib.Path(__file__).with_name("mmc.pth")))


mmc_micro = mmc_mini                           # the box has had a smaller one of this name
