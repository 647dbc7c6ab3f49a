"""Proves, on a machine with CUDA: a training step gives the CPU's losses in float32 and nearly so in bf16,
also compiled; nothing in a step waits for the device; a run survives NaN and a resume; the evaluations give
the CPU's numbers.  All is skipped elsewhere, but for what can be shown without a GPU: that is first."""
import json

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

import davis
import losses
import pretrain
import prompts
from data import ToyImages
from distributed import all_gather
from knn import knn_predict
from model import vit
from scenes import ToyScenes
from studies.bench import Step
from toy import video

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
SMALL = ("--arch vit_micro --patch_size 8 --global_crops_size 48 --local_crops_number 2 "
         "--local_crops_size 16 --head_hidden_dim 64 --head_out_dim 32 --batch_size 8 --noise_p 0 "
         "--drop_path 0").split()


def losses_of(device: str, *more: str) -> dict[str, float]:
    """Eq. (1) to (3) of the first step, from the same weights and crops on each device."""
    step = Step([*SMALL, *more], torch.device(device))
    inputs = pretrain.prepare(step.batch, step.args, step.device)
    with torch.autocast(device, torch.bfloat16, enabled=step.args.precision == "bf16"):
        out = step.student(inputs.corrupted, inputs.local, inputs.rec_index, inputs.pat_index)
        target = step.teacher(inputs.clean)
    found = pretrain.mmc_losses(out, target, inputs, step.args)
    assert all(loss.dtype == torch.float32 for loss in found.values())
    return {name: loss.item() for name, loss in found.items()}


def train(folder, *more: str) -> list[dict]:
    """Lines of the log of a short toy run."""
    short = "--epochs 1 --log_every 1 --knn_every 0 --save_every 1 --data".split()
    pretrain.main(pretrain.get_args([*SMALL, *short, str(more[0]), "--output_dir", str(folder), *more[1:]]))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"step"' in line]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image
    folder = tmp_path_factory.mktemp("images")
    source = ToyImages("train", 64, 48)
    for i in range(len(source)):
        Image.fromarray(source.scene(i).image).save(folder / f"{i:02d}.png")
    return folder


# ------------------------------------------------- without a GPU
def test_bf16_on_this_processor_gives_nearly_the_same_losses():
    plain, half = losses_of("cpu", "--precision", "fp32"), losses_of("cpu", "--precision", "bf16")
    assert half == pytest.approx(plain, rel=2e-2) and half != plain


def test_infonce_is_float32_inside_autocast():
    q, k = torch.randn(12, 8), torch.randn(3, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses.patch_contrast(q.bfloat16(), k.bfloat16(), 0.2)
    plain = losses.patch_contrast(q.bfloat16().float(), k.bfloat16().float(), 0.2)
    assert half.dtype == torch.float32 and half == pytest.approx(plain)


@pytest.mark.slow
def test_the_vit_compiles_without_a_graph_break():
    network = vit("vit_micro", 32, 8, drop_path=0.1).train()
    found = torch._dynamo.explain(network)(torch.randn(2, 3, 32, 32))
    assert found.graph_break_count == 0, found.break_reasons


def gathered_on_four_ranks(rank, ranks, folder):
    rows, first = all_gather(torch.full((2, 3), float(rank)))
    assert ranks == 4 and first == 2 * rank and rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_four_gloo_ranks_gather_in_order(tmp_path):
    run_ranks(gathered_on_four_ranks, 4, tmp_path)


# ------------------------------------------------- a training step
@cuda
def test_a_step_in_float32_equals_the_cpus():
    assert losses_of("cuda", "--precision", "fp32") == pytest.approx(losses_of("cpu"), rel=1e-3)


@cuda
def test_a_step_in_bf16_is_near_the_cpus():
    assert losses_of("cuda", "--precision", "bf16") == pytest.approx(losses_of("cpu"), rel=2e-2)


@cuda
def test_a_compiled_step_equals_an_eager_one():
    compiled = losses_of("cuda", "--precision", "fp32", "--compile")
    assert compiled == pytest.approx(losses_of("cuda", "--precision", "fp32"), rel=1e-3)


@cuda
def test_infonce_stays_float32_inside_autocast_on_cuda():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4 * 49, 32, generator=g), torch.randn(4, 49, 32, generator=g)
    with torch.autocast("cuda", torch.bfloat16):
        half = losses.patch_contrast(q.cuda(), k.cuda(), 0.05)
    assert half.item() == pytest.approx(losses.patch_contrast(q, k, 0.05).item(), rel=1e-5)


@cuda
@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_nothing_in_a_step_waits_for_the_device(tokens):
    options = [*SMALL, "--noise_p", "0.5", "--patch_tokens", tokens, "--precision", "bf16"]
    step = Step(options, torch.device("cuda"))
    step.batch = pinned(step.batch)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(batch):
    """As a loader with pin_memory gives it."""
    return torch.utils.data._utils.pin_memory.pin_memory(batch)


# ------------------------------------------------- a run
@cuda
def test_the_run_goes_on_after_a_stop_to_the_same_losses(images, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", images)

    class Killed(Exception):
        pass

    real, calls = pretrain.ema_update, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        real(*args)

    monkeypatch.setattr(pretrain, "ema_update", dying)
    with pytest.raises(Killed):
        train(tmp_path / "cut", images)
    monkeypatch.setattr(pretrain, "ema_update", real)
    again = {line["step"]: line["loss"] for line in train(tmp_path / "cut", images)}
    assert again == pytest.approx({line["step"]: line["loss"] for line in whole}, rel=1e-3)


@cuda
def test_nan_ends_the_run_with_code_3_and_leaves_a_sound_file(images, tmp_path, monkeypatch):
    real, calls = pretrain.prepare, []

    def poisoned(*args):
        calls.append(1)
        inputs = real(*args)
        if len(calls) == 4:
            inputs.corrupted[0, 0, 0, 0] = float("nan")
        return inputs

    monkeypatch.setattr(pretrain, "prepare", poisoned)
    with pytest.raises(SystemExit) as e:
        train(tmp_path, images)
    assert e.value.code == 3
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    assert all(v.isfinite().all() for v in last["teacher"].values()) and last["step"] <= 3


# ------------------------------------------------- evaluations
@cuda
def test_knn_predicts_what_the_cpu_predicts():
    g = torch.Generator().manual_seed(0)
    train_features, test_features = (F.normalize(torch.randn(n, 32, generator=g), dim=1) for n in (3000, 200))
    labels = torch.randint(10, (3000,), generator=g)
    on_cpu = knn_predict(train_features, labels, test_features, [10, 20])
    on_gpu = knn_predict(train_features.cuda(), labels.cuda(), test_features.cuda(), [10, 20])
    assert torch.equal(on_cpu, on_gpu.cpu())


@cuda
def test_prompts_get_the_cpus_iou():
    network, scenes = vit("vit_micro", 48, 8).eval(), ToyScenes(ToyImages("val", 40))
    found = []
    for device in ("cpu", "cuda"):
        features = prompts.network_features(network.to(device), torch.device(device))
        table = prompts.prompt_table(features, scenes, prompts.Protocol(size=48), 8)
        found.append(table.summary()["best"])
    assert found[1] == pytest.approx(found[0], abs=0.05)


@cuda
def test_videos_get_the_cpus_masks():
    frames, instances = video(0, frames=6, size=(64, 112))
    frames = [torch.from_numpy(f).permute(2, 0, 1) for f in frames]
    network, masks = vit("vit_micro", 64, 8).eval(), []
    for device in ("cpu", "cuda"):
        masks.append(list(davis.track(network.to(device), frames, instances[0], size=64, size_multiple=8)))
    agree = [(a == b).mean() for a, b in zip(*masks, strict=True)]
    assert min(agree) > 0.999
