"""The tables of the paper: what is missing is named, what is there is run once and shown."""

import json
import shlex

import pytest

from muse.experiments import reproduce
from muse.experiments.paper_measurements import MEASUREMENTS, NEEDS, Measurement, Need
from muse.experiments.paper_tables import TABLES, Cell
from muse.experiments.paper_tables import PaperTable as Table
from scripts import reproduce as script
from tests.helpers import one_error

PROGRAM = (
    "import json,pathlib,sys; d=pathlib.Path(sys.argv[1]); d.mkdir(parents=True, exist_ok=True); "
    "n=d/'runs'; n.write_text(n.read_text()+'x' if n.exists() else 'x'); "
    "(d/'metrics.json').write_text(json.dumps(dict(best=dict(micro=.5))))"
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A table of four cells: one that runs, one without weights, a long one, one that fails."""
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setitem(NEEDS, "weights", Need("weights of a net", ("$WEIGHTS_DIR/*.bin",), "me"))
    command = f"python -c {shlex.quote(PROGRAM)} {{output}}"
    added = {
        "runs": Measurement((command,)),
        "lacks": Measurement((f"{command} {{weights}}",), ("weights",)),
        "takes_long": Measurement((command,), (), "a week", True),
        "fails": Measurement(("python -c 'raise SystemExit(3)'",)),
    }
    for name, measurement in added.items():
        monkeypatch.setitem(MEASUREMENTS, name, measurement)
    cells = tuple(
        Cell(f"row {name}", "accuracy, %", name, ("best", "micro"), "85.2", 100, 1)
        for name in added
    )
    monkeypatch.setitem(TABLES, "small", Table("A small table", "a note", cells))
    return tmp_path


def test_runs_what_it_can_and_names_the_rest(small, capsys):
    assert script.main(["small", "--output_dir", str(small / "out")]) == 1  # one cell failed
    lines = capsys.readouterr().out.splitlines()
    said = {line.split("  ")[0]: line for line in lines if line.startswith("row ")}
    assert said["row runs"].split()[-3:] == ["85.2", "50.0", "measured"]
    assert said["row lacks"].endswith("–     missing: weights")
    assert said["row takes_long"].endswith("takes a week: add --long")
    assert "FAILED with code 3" in said["row fails"]
    assert any("weights of a net; expected at $WEIGHTS_DIR/*.bin; from: me" in one for one in lines)
    assert not (small / "out" / "lacks").exists() and not (small / "out" / "takes_long").exists()


def test_what_was_measured_is_read_and_another_command_is_run(small, capsys, monkeypatch):
    outcome = reproduce.run_measurement("runs", small / "out", long=False)
    assert outcome.state == "measured" and outcome.numbers == {"best": {"micro": 0.5}}
    assert reproduce.run_measurement("runs", small / "out", long=False).state == "measured before"
    assert (small / "out/runs/runs").read_text() == "x"
    assert (
        reproduce.run_measurement("runs", small / "out", False, ["--device", "cpu"]).state
        == "measured"
    )
    assert (small / "out/runs/runs").read_text() == "xx"


def test_a_need_is_found_at_its_first_place(small):
    (small / "weights").mkdir()
    assert reproduce.run_measurement("lacks", small / "out", long=False).state == "missing: weights"
    (small / "weights/b.bin").touch()
    (small / "weights/a.bin").touch()
    words = reproduce.command_words(MEASUREMENTS["lacks"], small / "out")
    assert words[0][-2:] == [str(small / "out"), str(small / "weights/a.bin")]
    assert reproduce.run_measurement("lacks", small / "out", long=False).state == "measured"
    assert reproduce.run_measurement("takes_long", small / "out", long=True).state == "measured"


def test_every_cell_names_its_measurement_and_every_command_its_needs():
    named = {cell.measurement for table in TABLES.values() for cell in table.cells}
    assert named <= set(MEASUREMENTS)
    for name, measurement in MEASUREMENTS.items():
        assert set(measurement.needs) <= set(NEEDS), name
        for command in measurement.commands:  # a place without a need is a KeyError
            command.format(output="o", **{need: "p" for need in measurement.needs})
        for command in reproduce.command_words(measurement, reproduce.ROOT / "o", found=False):
            assert (reproduce.ROOT / command[1]).is_file(), command
    assert {need for one in MEASUREMENTS.values() for need in one.needs} == set(NEEDS)


def test_commands_take_the_flags_that_the_table_gives_them():
    """Each flag of a command stands in its script's --help, or its launcher passes it on."""
    for name, measurement in MEASUREMENTS.items():
        for command in measurement.commands:
            words = shlex.split(command)
            script_file = reproduce.ROOT / words[1]
            if words[0] == "bash":
                stem = {"evaluate": "evaluate", "segment_probe": "segment_probe"}.get(
                    script_file.stem
                )
                if stem is None:
                    continue  # key=value words, or no flags
                script_file = reproduce.ROOT / "scripts" / f"{stem}.py"
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            text = _sources(script_file)
            for flag in flags:
                plain = flag.lstrip("-").replace("-", "_")
                assert f'"{plain}"' in text or f'"--{plain}"' in text, (name, flag)


def _sources(script_file):
    shared = ("muse/cli.py", "muse/evaluation/command.py", "muse/multimodal/umm_command.py")
    files = [script_file, *(reproduce.ROOT / name for name in shared)]
    return "".join(file.read_text() for file in files)


def test_the_page_is_made_of_the_tables():
    assert script.PAGE.read_text() == reproduce.page(script.recorded()), (
        "python scripts/reproduce.py --write_page"
    )
    numbers = {"probe_release": {"reported": {"micro": 0.8123}}}
    row = "| MUSE-1B (`release`) | linear probe, % ↑ | 85.2 | 81.2 |"
    assert row in reproduce.page(numbers) and row not in reproduce.page({})


def test_what_is_recorded_is_what_the_page_shows():
    numbers = {
        "reported": {"micro": 0.5, "macro": 0.25},
        "by_rate": [1, 2],
        "protocol": {"muse": "1", "device": "cpu", "checkpoint": {"path": "/somewhere"}},
    }
    kept = {"reported": {"micro": 0.5}, "protocol": {"muse": "1", "device": "cpu"}}
    assert reproduce.quoted_numbers("probe_release", numbers) == kept


def test_recorded_numbers_belong_to_measurements():
    assert set(script.recorded()) <= set(MEASUREMENTS)
    json.dumps(script.recorded(), allow_nan=False)


@pytest.mark.parametrize(("words", "said"), [(["tokeniser"], "tokenizer"), ([], "say which table")])
def test_wrong_input_is_one_line(words, said, capsys, tmp_path):
    code = script.main([*words, "--output_dir", str(tmp_path / "out")])
    assert said in one_error(capsys, code)
