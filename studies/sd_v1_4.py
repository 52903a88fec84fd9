r"""Which blocks of Stable Diffusion v1.4 can go, and how do searched students compare with BK-SDM's after the same distillation?

    python studies/sd_v1_4.py --out runs/sd-v1-4 --reports reports/sd-v1-4 --coco /data/coco --data /data/laion \
        --inception /data/pt_inception.pth --dry-run

prints the commands, the hours that each asks of a GPU, and the disk that it fills: in all about 560 hours and 170 GB beside the
data. Without `--dry-run` it runs them, and a killed study goes on. Needs the weights CompVis/stable-diffusion-v1-4, a ViT-g/14
CLIP, pytorch-fid's Inception, MS-COCO val2014 with its captions (`--coco`: `val2014/` and `metadata.csv`), image-caption pairs
(`--data`), and one CUDA GPU of 40 GB or more. The parts: a scan of every block; searches at the parameters of the three BK-SDM
designs; 50,000 updates of 256 images for six students; 30,000 images each under `bksdm-coco30k`; figure 7's guidance scales on
5,000 prompts; one HTML page. Hours are multiply-adds of the U-Net, attention included, over `--tflops`, a sustained rate that is
assumed and not measured: 100 for an A100 in half precision; students are reckoned like the teacher when they draw. Expected: the
published scores of the three designs again, and students of the search that are no worse at their sizes. Not run yet, for want of
such a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from steps import Step, chosen, parser_of

from blockprune.model import presets, pretrained
from blockprune.model.graph import BlockGraph
from blockprune.model.trace import trace

MODEL = "CompVis/stable-diffusion-v1-4"
BUDGETS = {"bk-sdm-base": "0.76B", "bk-sdm-small": "0.66B", "bk-sdm-tiny": "0.50B"}
PARTS = ("scan", "search", "distill", "evaluate", "sweep", "report")
CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
CFG_SCALES = (2.0, 2.5, 3.0, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5)
N_SCAN, N_NOISY, N_TRIALS, N_UPDATES, BATCH, N_COCO, N_SWEEP, N_STEPS = 250, 256, 200, 50_000, 256, 30_000, 5_000, 25
JPEG_BYTES = 20_000  # of one 256-pixel image
CHECKPOINTS = 3


def plan(args: argparse.Namespace, graph: BlockGraph) -> Iterator[Step]:
    """Every command in order, with what it costs."""
    half = ["--device", "cuda", "--dtype", "float16"]
    drawing = ["--n-images", str(N_SCAN), "--steps", str(N_STEPS), "--cfg-scale", "7.5"]
    full = graph.total.with_attention
    units = len(graph.units("block")) + 1
    drawn = 2 * N_STEPS * full  # of one image with guidance
    seen = ["--model", MODEL, "--prompts", f"{args.coco}/metadata.csv", *half]
    judged = ["--reference", f"{args.coco}/val2014", "--detector", "inception", "--clip", CLIP]
    yield Step(
        "scan", ["scan", *seen, *drawing, *judged, "--out", f"{args.out}/scan"], units * (N_SCAN * drawn + 3 * N_NOISY * full)
    )
    for design, budget in BUDGETS.items():
        search = ["search", *seen, *drawing, "--objective", "guided_mse", "--eps-samples", str(N_NOISY), "--trials", str(N_TRIALS)]
        macs = (N_TRIALS + 32) * 2 * N_NOISY * full
        yield Step("search", [*search, "--budget", budget, "--out", f"{args.out}/search-{design}"], macs)
    archs = {design: design for design in BUDGETS}
    archs |= {f"found-{budget}": f"{args.out}/search-{design}/best.json" for design, budget in BUDGETS.items()}
    models = {"sd-v1-4": MODEL}
    for (name, arch), design in zip(archs.items(), [*BUDGETS, *BUDGETS], strict=True):
        cost = graph.cost(presets.parse(design, graph))
        train = ["--train-batch-size", "32", "--gradient-accumulation-steps", str(BATCH // 32), "--max-train-steps", str(N_UPDATES)]
        how = ["--mixed-precision", "bf16", "--ema", "--compile", "--checkpointing-steps", "5000", "--validation-steps", "5000"]
        command = [
            "distill",
            "--teacher",
            MODEL,
            "--arch",
            arch,
            "--data",
            args.data,
            *train,
            *how,
            "--out",
            f"{args.out}/kd-{name}",
        ]
        # forward of the teacher; forward and backward, twice a forward, of the student; weights, two moments and the average kept
        yield Step("distill", command, N_UPDATES * BATCH * (full + 3 * cost.with_attention), (CHECKPOINTS * 16 + 8) * cost.params)
        models[name] = f"{args.out}/kd-{name}/pipeline"
    coco = ["--protocol", "bksdm-coco30k", "--reference", args.coco, "--inception-weights", args.inception, *half]
    for name, model in models.items():
        evaluate = ["evaluate", "--model", model, "--label", name, *coco]
        yield Step("evaluate", [*evaluate, "--latency", "--out", f"{args.out}/coco-{name}"], N_COCO * drawn, N_COCO * JPEG_BYTES)
        scales = ",".join(map(str, CFG_SCALES))
        sweep = [*evaluate, "--n-images", str(N_SWEEP), "--cfg-scale", scales, "--out", f"{args.out}/cfg-{name}"]
        yield Step("sweep", sweep, len(CFG_SCALES) * N_SWEEP * drawn, len(CFG_SCALES) * N_SWEEP * JPEG_BYTES)
    kinds = ("scan", "search-*", "kd-*", "coco-*", "cfg-*")
    yield Step("report", ["report", *(f"{args.out}/{kind}" for kind in kinds), "--out", f"{args.reports}/report.html"])


def hours(step: Step, tflops: float) -> float:
    """Two floating-point operations for each multiply-add."""
    return 2 * step.macs / (tflops * 1e12) / 3600


def main() -> None:
    parser = parser_of(__doc__, PARTS)
    parser.add_argument("--coco", required=True, help="folder with val2014/ and metadata.csv")
    parser.add_argument("--data", required=True, help="training pairs: see `blockprune distill --data`")
    parser.add_argument("--inception", required=True, help="pytorch-fid's Inception weights")
    parser.add_argument("--tflops", type=float, default=100.0, help="sustained rate that the hours are reckoned with")
    args = parser.parse_args()
    config = pretrained.configs("sd-v1-4")
    graph = trace(config.unet, config.latent(None), config.n_tokens)
    steps = chosen(plan(args, graph), args.part)
    for step in steps:
        print(f"{step}\n    # {hours(step, args.tflops):.1f} h, {step.disk_bytes / 1e9:.1f} GB", flush=True)
        if not args.dry_run:
            step.run()
    total, disk = sum(hours(step, args.tflops) for step in steps), sum(step.disk_bytes for step in steps)
    print(f"in all {total:,.0f} h at {args.tflops:g} TFLOPS, {disk / 1e9:,.0f} GB beside the data")


if __name__ == "__main__":
    main()
