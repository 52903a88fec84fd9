"""`blockprune graph` and `blockprune cost` as a user runs them, and how the command line fails."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from blockprune import cli
from blockprune.cost import components, latency
from blockprune.model.graph import BlockGraph
from blockprune.model.presets import preset
from blockprune.model.trace import trace
from blockprune.reports.table import quantity

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process => exit code, standard output, standard error."""

    def go(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return go


@pytest.fixture
def sd1(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("sd1")


def one_line(code: int, err: str) -> bool:
    return code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_graph_lists_every_block_with_its_shapes_costs_removal_and_skip(run: Run, sd1: Path) -> None:
    code, out, _ = run("graph", "--model", sd1)
    graph = trace(tiny.config("sd1"), n_tokens=tiny.N_TOKENS)
    assert code == 0
    for block in graph:
        assert (f"│ {block.name} " in out) == (block.kind != "C")  # components are listed when they are asked for
    row = next(line for line in out.splitlines() if "up_blocks.3.resnets.0" in line)
    assert "8x8" in row
    assert "24 → 8" in row  # the skip is 16 of the 24 that come in
    assert quantity(graph["up_blocks.3.resnets.0"].cost.params) in row
    assert "keeps its 1x1 shortcut alone" in row
    assert "down_blocks.0.attentions.1" in row
    assert "no: it changes the resolution" in out


def test_graph_as_json_is_the_graph(run: Run, sd1: Path) -> None:
    _, out, _ = run("graph", "--model", sd1, "--json", "--unit", "pair", "--resolution", "20x16")
    data = json.loads(out)
    assert BlockGraph.from_json(data) == trace(tiny.config("sd1"), (10, 8), tiny.N_TOKENS)
    assert ["conv_in", "up_blocks.3.resnets.2"] in data["skip_edges"]
    assert data["units"]["down_blocks.0.pair.1"]["removed"] == ["down_blocks.0.attentions.1", "down_blocks.0.resnets.1"]


def test_graph_by_unit(run: Run, sd1: Path) -> None:
    _, out, _ = run("graph", "--model", sd1, "--unit", "stage", "--macs", "with_attention")
    assert "innermost" in out
    assert "MACs saved (with_attention)" in out


def test_cost_as_json_prices_student_and_teacher(run: Run, sd1: Path) -> None:
    code, out, _ = run("cost", "--model", sd1, "--arch", "bk-sdm-small", "--steps", 4, "--json")
    data = json.loads(out)
    graph = trace(tiny.config("sd1"), n_tokens=tiny.N_TOKENS)
    student, teacher = graph.cost(preset("bk-sdm-small")), graph.total
    assert code == 0
    assert data["architecture"] == preset("bk-sdm-small").to_json()
    assert data["unet"] == student.to_json()
    assert data["teacher"]["unet"] == teacher.to_json()
    assert set(data["unet"]["macs"]) == {"thop", "conv_linear", "with_attention"}
    assert data["pipeline"]["params"] == student.params + data["text_encoder"]["params"] + data["vae_decoder"]["params"]
    whole = data["text_encoder"]["macs"]["thop"] + 4 * student.thop + data["vae_decoder"]["macs"]["thop"]
    assert data["pipeline"]["macs"]["thop"] == whole
    assert data["reduction"]["unet"]["params"] == pytest.approx(1 - student.params / teacher.params)


def test_cost_of_a_published_model_in_its_table(run: Run) -> None:
    _, out, _ = run("cost", "--model", "sd-v1-4", "--arch", "bk-sdm-small")
    params, macs = (
        {line.split("  ")[0].strip(): line.split("  ") for line in part.splitlines()} for part in out.split("MACs (thop)")
    )
    cells = {name: [cell.strip() for cell in cells[1:] if cell.strip()] for name, cells in params.items()}
    assert cells["U-Net x 1"] == ["859.5 M", "482.3 M (56%)"]
    assert cells["whole"] == ["1.032 G", "654.9 M (63%)"]
    cells = {name: [cell.strip() for cell in cells[1:] if cell.strip()] for name, cells in macs.items()}
    assert cells["U-Net x 1"] == ["338.7 G", "217.7 G (64%)"]
    assert cells["U-Net x 25"] == ["8.469 T", "5.443 T (64%)"]
    assert cells["VAE decoder"] == ["1.240 T", "1.240 T (100%)"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_tables_fit_the_terminal(width: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three students side by side, and the blocks, whole: no column is left out, no row is longer than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    archs = [a for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny") for a in ("--arch", name)]
    code, out, _ = run("cost", "--model", "sd-v1-4", *archs)
    assert code == 0
    assert all(text in out for text in ("859.5 M", "579.4 M (67%)", "482.3 M (56%)", "323.4 M (38%)", "205.0 G (61%)"))
    assert "no room" not in out
    assert max(map(len, out.splitlines())) <= width
    _, out, _ = run("graph", "--model", "sd-v1-4")
    assert max(len(line) for line in out.splitlines() if line.startswith(("│", "┃"))) <= width
    row = next(line for line in out.splitlines() if ("up_blocks.3.resnets.0" if width == 200 else "up 3 R0") in line)
    assert all(text in row for text in ("64x64", "960 → 320"))


def test_several_students_in_json_are_exact(run: Run) -> None:
    _, out, _ = run("cost", "--model", "sd-v1-4", "--arch", "bk-sdm-base", "--arch", "bk-sdm-tiny", "--json")
    students = {student["label"]: student["unet"] for student in json.loads(out)["students"]}
    assert {name: s["params"] for name, s in students.items()} == {"bk-sdm-base": 579_384_964, "bk-sdm-tiny": 323_384_964}
    assert students["bk-sdm-tiny"]["macs"]["thop"] == 205_035_274_240


def test_components_of_the_published_students_side_by_side(run: Run) -> None:
    """The paper's table of parts, in its own convention; the 25-step figures are 25 times one step."""
    names = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
    args = ["--model", "sd-v1-4", *(a for name in names for a in ("--arch", name)), "--components"]
    _, out, _ = run("cost", *args, "--json")
    rows = {(r["who"], r["name"]): r for r in json.loads(out)["components"]}
    paper = {"teacher": (859_520_964, 338_749_194_240, 1_032_071_623), "bk-sdm-base": (579_384_964, 223_755_632_640, 751_935_623)}
    paper |= {
        "bk-sdm-small": (482_346_884, 217_727_959_040, 654_897_543),
        "bk-sdm-tiny": (323_384_964, 205_035_274_240, 495_935_623),
    }
    assert set(rows) == {
        (who, name) for who in paper for name in ("text encoder", "U-Net x 1", "U-Net x 25", "VAE decoder", "whole")
    }
    for who, (params, macs, whole) in paper.items():
        found = {name: (row["params"], row["macs"]["thop"]) for (w, name), row in rows.items() if w == who}
        assert found["U-Net x 1"] == (params, macs)
        assert found["U-Net x 25"] == (params, 25 * macs)
        assert found["text encoder"] == (123_060_480, 6_545_882_112)
        assert found["VAE decoder"] == (49_490_179, 1_240_079_532_032)
        assert found["whole"] == (whole, 6_545_882_112 + 25 * macs + 1_240_079_532_032)
        assert rows[who, "U-Net x 1"]["latency_s"] is None


@pytest.mark.slow
def test_components_are_timed_one_by_one(run: Run, sd1: Path) -> None:
    args = ["--model", sd1, "--arch", "bk-sdm-tiny", "--components", "--latency", "--rounds", 5, "--steps", 3, "--device", "cpu"]
    _, out, _ = run("cost", *args, "--json")
    rows = {(r["who"], r["name"]): r for r in json.loads(out)["components"]}
    seconds = {part: row["latency_s"] for part, row in rows.items()}
    names = ("text encoder", "U-Net x 1", "U-Net x 3", "VAE decoder", "whole")
    assert set(seconds) == {(who, name) for who in ("teacher", "bk-sdm-tiny") for name in names}
    assert min(seconds.values()) > 0
    _, out, _ = run("cost", *args)
    for (who, _), row in rows.items():
        assert (row["ratio"] is None) == (who == "teacher")
        assert who == "teacher" or row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    (line,) = (line for line in out.split("latency, × teacher")[1].splitlines() if "U-Net x 3" in line)
    assert line.count("[") == 1  # the ratio with its interval, and no milliseconds of the student


def test_cost_of_two_text_encoders(run: Run, tiny_folder: Callable[[str], Path]) -> None:
    _, out, _ = run("cost", "--model", tiny_folder("sdxl"), "--arch", "ssd-1b", "--json")
    data = json.loads(out)
    parts = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    assert data["pipeline"]["params"] == sum(data[p]["params"] for p in parts)


@pytest.mark.slow
def test_verify_asks_thop_and_fvcore(run: Run, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("cost", "--model", sd1, "--arch", "mid_block", "--verify")
    assert code == 0
    assert out.count("agree with these counts") == 3
    right = components.Part.count
    monkeypatch.setattr(components.Part, "count", lambda part: {k: c + c for k, c in right(part).items()})
    code, _, err = run("cost", "--model", sd1, "--verify")
    assert one_line(code, err)
    assert "Linear" in err
    assert " against " in err


def test_latency_is_measured_in_turn(run: Run, sd1: Path) -> None:
    _, out, _ = run(
        "cost", "--model", sd1, "--arch", "bk-sdm-tiny", "--latency", "--rounds", 5, "--device", "cpu", "--batch-size", 2, "--json"
    )
    data = json.loads(out)["latency"]
    assert (data["device"], data["dtype"], data["batch_size"], data["teacher"]["n"]) == ("cpu", "float32", 2, 5)
    assert data["ratio"]["low"] <= data["ratio"]["value"] <= data["ratio"]["high"]
    assert data["student"]["mem_bytes"] < data["teacher"]["mem_bytes"]
    assert run("cost", "--model", sd1, "--rounds", 3)[0] == 0  # which says nothing where nothing is timed
    _, out, _ = run("cost", "--model", sd1, "--latency", "--rounds", 5, "--device", "cpu")
    assert "student / teacher, paired by round" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["graph", "--model", "sd-v1-44"], "did you mean sd-v1-4"),
        (["graph", "--model", "SD1", "--unit", "row"], "unknown unit 'row'"),
        (["graph", "--model", "SD1", "--macs", "flops"], "unknown MAC convention 'flops'"),
        (["graph", "--model", "SD1", "--resolution", "15"], "multiple of 2"),
        (["cost", "--model", "SD1", "--arch", "down_blocks.0.resnet.1"], "did you mean down_blocks.0.resnets.1"),
        (["cost", "--model", "SD1", "--arch", "down_blocks.0.downsamplers.0"], "cannot remove"),
        (["cost", "--model", "SD1", "--arch", "down_blocks.3"], "with it"),
        (["cost", "--model", "SD1", "--arch", "ssd-1b"], "is for another U-Net"),
        (["cost", "--model", "SD1", "--arch", "missing.json"], "missing.json"),
        (["cost", "--model", "SD1", "--arch", "-mid_block,+mid_block"], "removes nothing"),
        (["cost", "--model", "SD1", "--steps", "0"], "--steps must be at least 1"),
        (["cost", "--model", "SD1", "--arch", "bk-sdm-base", "--arch", "mid_block", "--latency"], "add --components, or give one"),
        (["cost", "--model", "SD1", "--arch", "bk-sdm-smal"], "did you mean bk-sdm-small"),
        (["cost", "--model", "SD1", "--arch", "mid_block,bksdm-tiny"], "no preset or block 'bksdm-tiny': did you mean bk-sdm-tiny"),
        (["cost", "--model", "SD1", "--components", "--verify"], "--components goes without --verify"),
        (["cost", "--model", "SD1", "--latency", "--rounds", "1"], "--rounds must be at least 5"),
        (["cost", "--model", "SD1", "--latency", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["cost", "--model", "SD1", "--latency", "--dtype", "int8"], "unknown --dtype 'int8': choose from float32"),
        (["cost", "--model", "SD1", "--latency", "--device", "gpu0"], "cannot use the device 'gpu0'"),
        (["cost", "--model", "SD1", "--latency", "--device", "meta"], "computes nothing"),
    ],
)
def test_mistakes_are_one_line_and_code_2(argv: list[str], says: str, run: Run, sd1: Path) -> None:
    code, out, err = run(*(str(sd1) if a == "SD1" else a for a in argv))
    assert one_line(code, err), err
    assert says in err
    assert out == ""


def test_unknown_options_leave_with_code_2(run: Run) -> None:
    code, _, err = run("cost", "--modle", "x")
    assert code == 2
    assert "--modle" in err


def test_a_full_disk_is_one_line(run: Run, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("blockprune.cli.options.print_json", full)
    code, _, err = run("graph", "--model", sd1, "--json")
    assert one_line(code, err)
    assert "disk is full" in err


def test_ctrl_c_leaves_with_130(run: Run, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockprune.cli.options.print_json", stop)
    assert run("graph", "--model", sd1, "--json")[0] == 130


def test_a_fault_of_ours_is_not_dressed_up(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("blockprune.cli.options.print_json", fault)
    with pytest.raises(ZeroDivisionError):
        cli.main(["graph", "--model", str(sd1), "--json"])


@pytest.mark.parametrize("argv", [["--help"], ["graph", "--help"], ["cost", "--help"]])
def test_help_answers_without_torch(argv: list[str]) -> None:
    script = "import sys\nfrom blockprune.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: code = e.code\n"
    script += "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    script += "sys.exit(code or ','.join(heavy) or 0)"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: blockprune" in done.stdout


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "blockprune", "graph", "--nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No such option: --nonsense")
    assert "see `blockprune graph --help`" in done.stderr


def test_paired_ratio_and_its_interval() -> None:
    teacher = latency.Timing((1.0, 2.0, 4.0, 8.0), 0)
    student = latency.Timing((0.5, 1.0, 2.0, 4.0), 0)
    assert latency.ratio(teacher, student) == (0.5, 0.5, 0.5)
    assert teacher.median_s == 3.0
    assert latency.ratio(teacher, latency.Timing((0.5, 1.0, 2.0, 8.0), 0))[2] > 0.5


class Net(torch.nn.Module):
    """4000 bytes of weights; a step has three tensors of its input's size at once."""

    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self.name, self.order, self.weight = name, order, torch.nn.Parameter(torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.order.append(self.name)
        a = x + 1
        b = a + 1
        del a
        return b * 2 + b


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_models_are_measured_in_turn_and_peak_memory_is_exact(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    order: list[str] = []
    nets = {name: Net(name, order).to(device) for name in "AB"}
    x = torch.zeros(2**20, device=device)
    models = {name: partial(nullcontext, net) for name, net in nets.items()}
    found = latency.measure(models, {"x": x}, n=3, n_warmup=1, device=device)
    assert order == list("AB" * 4 + "AB")  # warm-up, three rounds, and one for memory
    assert found["A"].mem_bytes == 4000 + 3 * 4 * 2**20
    assert len(found["A"].latency_s) == 3
    assert min(found["A"].latency_s) > 0
