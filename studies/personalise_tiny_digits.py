"""Does a pruned student learn a new subject as well as its teacher, and does it keep what it knew?

    python studies/personalise_tiny_digits.py --out runs/personalise --reports reports/personalise

The subject is a glyph that is no digit, an arrow, in five drawings, under the word "sks", which tiny-digits has never read. The
teacher, bk-sdm-small and a student that search has found at its size (reports/after-training), both distilled for 200 updates
first, learn it in 150 updates of four images: all weights at learning rate 2e-4; the same beside images of the class, scenes of
digits under 64 captions that the teacher draws; and a LoRA at 2e-3 beside them. The papers' rates (1e-6, 1e-4) are for models
400 times as large. An independent reader, a support vector machine trained on digits and on other drawings of the arrow, says
where it finds the subject and whether digits are still what captions say. Updates are timed in turn, in processor time. About
25 minutes on one processor core. Expected: all three learn the subject; without the class's images digits are forgotten, with
them they are kept. Measured: with all weights so; a LoRA of rank 16 is too small for the searched student, whose attentions are few
(`reports/personalise/table.md`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from quality_tiny_digits import cells, generate, real_scenes
from sklearn.svm import SVC
from steps import Step, chosen, parser_of

from blockprune import load_pipeline
from blockprune.data.digits import CELL_PX, EMPTY, SCENE_PX, DigitScenes, render_digit
from blockprune.measures.intervals import interval, mean_statistic
from blockprune.stages.loading import any_model
from blockprune.stages.personalise.dreambooth import DreamBooth
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.personalise.run import parts_of, samplers_of, trainer_of
from blockprune.stages.train.launch import accelerated

PARTS = ("distill", "personalise", "judge")
FOUND = "after-training/rows/small-guided_mse-linear-0-2000.json"
STYLE, BESIDE = "regular upright", 3
PROMPTS = (f"{STYLE}: sks top left", f"{STYLE}: sks top left, three bottom right")
N_CLASS = 64
DISTILL = "--max-train-steps 200 --learning-rate 5e-4 --ema --checkpointing-steps 50 --n-images 8"
TRAIN = "--max-train-steps 150 --train-batch-size 4 --checkpointing-steps 50 --n-images 64"
PRIOR = ["--with-prior-preservation", "--num-class-images", str(N_CLASS), "--sample-batch-size", "32"]
WAYS = {
    "all weights": ["--learning-rate", "2e-4"],
    "all weights, prior": ["--learning-rate", "2e-4", *PRIOR],
    "LoRA, prior": ["--rank", "16", "--learning-rate", "2e-3", *PRIOR],
}
N_DRAWINGS, N_DRAWN, N_SHOWN, N_CAPTIONS, N_READER, N_ROUNDS = 5, 64, 4, 128, 4000, 8
STEPS, CFG_SCALE = 10, 3.0
SUBJECT = 11  # the class of the reader for the subject; 0-9 are digits, 10 is an empty cell
INK_PX = 64
HEADING = (
    "dino, clip_i and clip_t over both prompts (n = 64). Then what the reader finds: the subject drawn alone, beside a three, "
    "and that three (n = 64 each), the digits of 128 held-out captions, and scenes of these that show the subject unasked. "
    "95 % intervals. Update time is processor time relative to the teacher's, in turn."
)
Row = dict[str, Any]


def drawing(seed: int) -> np.ndarray:
    """Return ink (8, 8) float32 in [0, 1] of one arrow that points up, drawn by a hand that is never quite the same."""
    draw = np.random.default_rng((seed, 7))
    picture = Image.new("L", (INK_PX, INK_PX))
    pen = ImageDraw.Draw(picture)
    top, foot = np.array([32, 8]) + draw.uniform(-3, 3, 2), np.array([32, 56]) + draw.uniform(-3, 3, 2)
    wings = [top + np.array([side * draw.uniform(16, 21), draw.uniform(16, 22)]) for side in (-1, 1)]
    for end in (foot, *wings):
        pen.line([tuple(top), tuple(end)], fill=255, width=int(draw.integers(9, 12)))
    return np.asarray(picture.reduce(INK_PX // 8), dtype=np.float32) / 255


def cell(seed: int, slant: int, weight: int) -> np.ndarray:
    """Return one cell (16, 16) float32 of ink with an arrow, as digits are set into cells."""
    draw = np.random.default_rng((seed, 8))
    size_px = draw.uniform(11.0, 14.0)
    room_px = (CELL_PX - size_px) / 2
    return render_digit(drawing(seed), slant, weight, size_px, tuple(draw.uniform(-room_px, room_px, 2)))


def write_subject(folder: Path) -> Path:
    """Writes the drawings, each in the top left of a scene that is empty otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(N_DRAWINGS):
        paper = np.zeros((SCENE_PX, SCENE_PX), dtype=np.float32)
        paper[:CELL_PX, :CELL_PX] = cell(i, 1, 1)
        Image.fromarray(np.round(255 * (1 - paper)).astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
    return folder


def train_reader(n_scenes: int) -> SVC:
    """Return a classifier of cells (0-9, 10 = empty, 11 = the subject), trained on digits and on other drawings of the subject."""
    images, _, labels = zip(*DigitScenes("train", 100, n_scenes), strict=True)
    ink, names = cells(np.stack(images)), np.array([row.digits for row in labels]).ravel()
    n_arrows = n_scenes // 8
    arrows = np.stack([cell(1000 + i, i % 3, i // 3 % 3).ravel() for i in range(n_arrows)])
    return SVC(C=10).fit(np.concatenate([ink, arrows]), np.concatenate([names, np.full(n_arrows, SUBJECT)]))


def plan(runs: Path) -> Iterator[Step]:
    """Every command in order: the students, then each model in each way."""
    for name, arch in {"bk-sdm-small": "bk-sdm-small", "found": str(runs / "found.json")}.items():
        yield Step("distill", ["distill", "--arch", arch, *DISTILL.split(), "--out", str(runs / f"distill-{name}")])
    for way, options in WAYS.items():
        for name, model in models(runs).items():
            prior = ["--teacher", "tiny-digits", "--class-data-dir", str(runs / "class"), "--class-prompt", str(runs / "class.txt")]
            words = ["--instance-prompt", f"{STYLE}: sks top left", "--validation-prompts", str(runs / "prompts.txt")]
            command = ["personalise", "--model", model, "--instance-data-dir", str(runs / "subject"), *words, *TRAIN.split()]
            yield Step(
                "personalise", [*command, *options, *(prior if "prior" in way else []), "--out", str(run_of(runs, way, name))]
            )


def models(runs: Path) -> dict[str, str]:
    return {"tiny-digits": "tiny-digits"} | {name: str(runs / f"distill-{name}") for name in ("bk-sdm-small", "found")}


def run_of(runs: Path, way: str, name: str) -> Path:
    return runs / f"{way.replace(', ', '-').replace(' ', '-')}-{name}"


def prepare(runs: Path, reports: Path) -> None:
    """Writes what the commands read: drawings, prompts, and the architecture that an earlier study has found by search."""
    write_subject(runs / "subject")
    (runs / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    captions = [caption for _, caption, _ in DigitScenes("train", 7, N_CLASS)]
    (runs / "class.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    row = json.loads((reports.parent / FOUND).read_text(encoding="utf-8"))
    (runs / "found.json").write_text(json.dumps({"format": 1, "removed": row["removed"]}) + "\n", encoding="utf-8")


def read(pipeline: StableDiffusionPipeline, reader: SVC) -> tuple[Row, np.ndarray]:
    """Return what the reader finds, each with its interval, and the images under PROMPTS, a row of N_SHOWN for each."""
    prompts = [prompt for prompt in PROMPTS for _ in range(N_DRAWN)]
    images = generate(pipeline, prompts, STEPS, CFG_SCALE)
    found = reader.predict(cells(images)).reshape(len(PROMPTS), N_DRAWN, 4)
    _, captions, digits = real_scenes(17, N_CAPTIONS)
    plain = reader.predict(cells(generate(pipeline, captions, STEPS, CFG_SCALE))).reshape(-1, 4)
    hits = {
        "subject alone": found[0, :, 0] == SUBJECT,
        "subject beside a digit": found[1, :, 0] == SUBJECT,
        "the digit beside it": found[1, :, 3] == BESIDE,
        "digits read": (plain == digits)[digits != EMPTY],
        "subject where none is named": (plain == SUBJECT).any(axis=1),
    }
    shown = images.reshape(len(PROMPTS), N_DRAWN, *images.shape[1:])[:, :N_SHOWN]
    return {name: rate(values) for name, values in hits.items()}, shown


def rate(hits: np.ndarray) -> Row:
    low, high = interval(mean_statistic(hits), len(hits), seed=0) or (None, None)
    return {"value": float(hits.mean()), "low": low, "high": high, "n": len(hits)}


def load(runs: Path, way: str, name: str) -> StableDiffusionPipeline:
    """Return the pipeline that a run left, or its model with the LoRA that it left."""
    folder = run_of(runs, way, name)
    if (folder / "pipeline").is_dir():
        return load_pipeline(folder / "pipeline")
    model = models(runs)[name]
    pipeline = load_pipeline(model if name == "tiny-digits" else Path(model) / "pipeline")
    pipeline.load_lora_weights(folder / "lora")
    return pipeline


def update_times(runs: Path) -> dict[str, float]:
    """Return the time of an update of each model relative to the teacher's, all in turn: the median over rounds."""
    with accelerated("cpu") as accelerator:
        trainers = {name: trainer(runs, model, accelerator) for name, model in models(runs).items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(N_ROUNDS):
            for name, one in trainers.items():
                begun = time.process_time()  # of this process alone: others share the machine
                list(one.run(one.step + 2))
                seconds[name].append(time.process_time() - begun)
    ratios = {name: np.array(values) / np.array(seconds["tiny-digits"]) for name, values in seconds.items()}
    return {name: float(np.median(values[1:])) for name, values in ratios.items()}


def trainer(runs: Path, model: str, accelerator: Accelerator) -> DreamBooth:
    request = PersonaliseRequest(
        instance_data_dir=str(runs / "subject"),
        instance_prompt=PROMPTS[0],
        train_batch_size=4,
        with_prior_preservation=True,
        class_data_dir=str(runs / "class"),
        class_prompt=str(runs / "class.txt"),
        num_class_images=N_CLASS,
    )
    loaded = any_model(model, None, "cpu")
    return trainer_of(loaded, request, parts_of(loaded, request), samplers_of(loaded, request), accelerator, None)


def table(rows: dict[str, Row], times: dict[str, float]) -> str:
    """Return the report."""
    found = list(next(iter(rows.values()))["read"])
    scores = ("dino", "clip_i", "clip_t")
    lines = ["# A new subject, for the teacher and two students of its half", "", HEADING, ""]
    lines += [
        f"| | {' | '.join([*scores, *found, 'update time', 'peak memory'])} |",
        "| --- |" + " ---: |" * (len(scores) + len(found) + 2),
    ]
    for label, row in rows.items():
        cost = (
            [f"x {times[row['model']]:.2f}", f"{row['scores']['train_memory']['value'] / 2**20:.0f} MiB"]
            if row["scores"]
            else ["", ""]
        )
        values = [shown(row["scores"].get(name)) for name in scores] + [shown(row["read"][name]) for name in found]
        lines.append(f"| {label} | {' | '.join([*values, *cost])} |")
    return "\n".join(lines) + "\n"


def shown(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.3f}" + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")


def picture(strips: dict[str, np.ndarray], file: Path) -> None:
    """Writes the first images of each, two prompts a row."""
    side, zoom, left = SCENE_PX * 2, 2, 200
    width = left + len(PROMPTS) * (N_SHOWN * side + 12)
    canvas = Image.new("RGB", (width, len(strips) * (side + 8) + 24), "white")
    pen = ImageDraw.Draw(canvas)
    for j, prompt in enumerate(PROMPTS):
        pen.text((left + j * (N_SHOWN * side + 12), 6), prompt, fill="black", font_size=11)
    for i, (label, strip) in enumerate(strips.items()):
        y = 24 + i * (side + 8)
        pen.text((4, y + side // 2 - 6), label, fill="black", font_size=11)
        for j, images in enumerate(strip):
            row = Image.fromarray(np.concatenate(list(images), axis=1))
            canvas.paste(
                row.resize((row.width * zoom, row.height * zoom), Image.Resampling.NEAREST), (left + j * (N_SHOWN * side + 12), y)
            )
    canvas.save(file)


def judge(runs: Path, reports: Path) -> None:
    """Reads what each model draws before and after, and writes table, picture and rows."""
    reader, strips = train_reader(N_READER), {}
    rows: dict[str, Row] = {}
    labels = {(name, way): f"{name}, {way}" for way in ("before", *WAYS) for name in models(runs)}
    for (name, way), label in sorted(labels.items(), key=lambda item: list(models(runs)).index(item[0][0])):
        model = models(runs)[name]
        before = load_pipeline(model if name == "tiny-digits" else Path(model) / "pipeline") if way == "before" else None
        found, strips[label] = read(before or load(runs, way, name), reader)
        file = run_of(runs, way, name) / "scores.json"
        scores = {} if before else {score["measure"]: score for score in json.loads(file.read_text(encoding="utf-8"))}
        rows[label] = {"model": name, "way": way, "read": found, "scores": scores}
        print(label, {key: round(value["value"], 3) for key, value in found.items()}, flush=True)
    times = update_times(runs)
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "table.md").write_text(table(rows, times), encoding="utf-8")
    (reports / "rows.json").write_text(json.dumps({"rows": rows, "update_times": times}, indent=1) + "\n", encoding="utf-8")
    picture(strips, reports / "drawn.png")


def main() -> None:
    args = parser_of(__doc__, PARTS).parse_args()
    steps = chosen(plan(args.out), args.part)
    if args.dry_run:
        print("\n".join(map(str, steps)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.out, args.reports)
    for step in steps:
        step.run()
    if not args.part or "judge" in args.part:
        judge(args.out, args.reports)


if __name__ == "__main__":
    main()
