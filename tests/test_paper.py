"""The paper's presets beside its statements, and its figures and tables from runs."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.app import Context, RecordDict
from inprocess import LocalGrid
from test_results import write_run
from test_runlog import client_app, go, server_app, summary_of

from autoflip_flwr import settings
from autoflip_flwr.app import build, costs
from autoflip_flwr.cli import _parser, main
from autoflip_flwr.compare import paper, plan
from autoflip_flwr.errors import DataError, SettingsError
from autoflip_flwr.method import mask

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

# --- presets ------------------------------------------------------------------------

PAPERS = ("mnist", "cifar10", "cifar100", "femnist", "shakespeare")


def statements() -> dict[str, list[str]]:
    """Return key -> value for each preset, of the table of the paper's statements."""
    _, _, page = (ROOT / "docs" / "paper-map.md").read_text().partition("\n## ")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines[2:]]
    return {key: values for key, *values in cells}


@pytest.mark.parametrize("place", range(5), ids=PAPERS)
def test_the_papers_presets_have_the_values_of_the_table(place):
    preset = f"paper-{PAPERS[place]}"
    chosen = settings.load(preset)
    flat = chosen.flat()
    told = {key: values[place] for key, values in statements().items()}
    parameters = int(told.pop("parameters").replace(",", ""))
    assert parameters == costs.parameters(build.build_model(chosen))
    a_round = int(chosen.strategy.fraction_train * chosen.strategy.min_nodes)
    assert a_round == int(told.pop("clients a round"))
    compression = told.pop("override of pruning.threshold in mode compression")
    text = (ROOT / "conf" / f"{preset}.yaml").read_text()
    assert f"pruning.mode=compression pruning.threshold={compression} " in text
    for key, value in told.items():
        if value:
            assert yaml.safe_load(value) == flat[key], key


@pytest.mark.parametrize("name", PAPERS)
def test_the_other_readings_beside_a_papers_preset_are_overrides(name):
    text = (ROOT / "conf" / f"paper-{name}.yaml").read_text()
    others = re.findall(r"^#   (\S+=.*?)  #", text, re.MULTILINE)
    assert len(others) >= 4
    chosen = settings.load(f"paper-{name}")
    for overrides in others:
        assert settings.load(f"paper-{name}", overrides) != chosen, overrides


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_preset_runs_at_full_model_size(name, tmp_path):
    """One round of two clients on a few samples; nothing of the model is cut."""
    if not SHARED.is_dir():
        pytest.skip("needs the datasets in ../shared/data")
    folder = SHARED / name if name in ("femnist", "shakespeare") else SHARED
    overrides = (
        f"data.dir={folder} data.max-samples=60 data.max-test-samples=10 rounds=1 "
        "strategy.min-nodes=2 strategy.fraction-train=1.0 exploration.epochs=2 "
        "training.epochs=1 "
    )
    if name in ("mnist", "cifar10"):
        overrides += "data.classes-per-client=5"
    else:  # too few samples for a Dirichlet split, or one by user
        overrides += "data.partition=iid"
    config = {
        "preset": f"paper-{name}",
        "overrides": overrides,
        "output-dir": str(tmp_path / "run"),
    }
    grid = LocalGrid(client_app.app, [1, 2], run_config=config)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    summary = summary_of(tmp_path / "run")
    chosen = settings.load(f"paper-{name}")
    assert summary["parameters"] == costs.parameters(build.build_model(chosen))
    assert summary["density"] == pytest.approx(0.7, abs=1e-6)
    phases = [sent.phase for sent in grid.up]
    assert (phases.count("explore"), phases.count("train")) == (2, 2)


# --- figures and tables -------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two arms of paper-mnist, one with two seeds and its guidance."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"preset": "paper-mnist", "accuracy": (0.25, 0.5), "parameters": 1000}
    write_run(folder / "dense", "strategy.name=fedavg", density=1.0, **common)
    for seed in (0, 1):
        write_run(
            folder / f"{seed}",
            f"seed={seed} exploration.epochs=3",
            density=0.5,
            **common,
        )
    values = np.array([[0.0, 0.02, 0.1], [0.2, 0.4, 0.8]], np.float32)
    np.savez(folder / "1" / "guidance.npz", weight=values, bias=values[0])
    return folder


def made(name, runs, tmp_path, **options):
    return paper.draw(name, [runs], output=tmp_path, **options)


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def drawn(page):
    """Return the specification in a page, and its rows."""
    tag = '<script type="application/json">'
    text = page.read_text().partition(tag)[2].partition("</script>")[0]
    spec = json.loads(text)
    return spec, [row for rows in spec["datasets"].values() for row in rows]


@pytest.mark.parametrize(
    ("name", "axes"),
    {
        "fig3": ["top-1 accuracy"],
        "fig4": ["top-1 accuracy", "loss"],
        "fig5": ["top-1 accuracy", "loss"],
        "fig8": ["loss"],
        "fig9": ["multiply-accumulates of a sample"],
        "drift": ["cosine", "variance over all", "changed share of the mask"],
    }.items(),
)
def test_a_figure_is_a_picture_and_a_page_that_needs_no_network(
    name, axes, runs, tmp_path
):
    path, _, table = made(name, runs, tmp_path).partition("\n")
    assert path == str(tmp_path / f"{name}.html")
    page = Path(path).read_text()
    without_scripts = re.sub("(<script[^>]*>).*?</script>", r"\1", page, flags=re.S)
    assert without_scripts.count("<script") == 2
    assert not re.search(r"src|href|url|import|<link", without_scripts)
    assert len(rows_of(table)) == 2
    picture = Path(path).with_suffix(".svg").read_text()
    for words in ("paper-mnist", "fedavg", "autoflip", *axes):
        assert words in picture, words


def test_a_line_has_the_rounds_of_all_seeds_and_a_band_if_they_are_many(tmp_path):
    for seed in range(5):
        accuracy = (0.1 + 0.01 * seed, 0.5, None if seed else 0.9)
        write_run(tmp_path / "runs" / str(seed), f"seed={seed}", accuracy=accuracy)
    made("fig3", tmp_path / "runs", tmp_path)
    spec, rows = drawn(tmp_path / "fig3.html")
    first = [row["accuracy"] for row in rows if row["round"] == 1]
    assert first == pytest.approx([0.1, 0.11, 0.12, 0.13, 0.14])
    assert [row["accuracy"] for row in rows if row["round"] == 3] == [None] * 5
    band, line, *_ = spec["hconcat"][0]["vconcat"][0]["layer"]
    assert band["mark"]["type"] == "errorband"
    assert line["mark"]["type"] == "line"
    assert line["encoding"]["y"]["aggregate"] == "mean"


def test_pruned_parameters_do_not_vary(runs, tmp_path):
    made("drift", runs, tmp_path)
    _, rows = drawn(tmp_path / "drift.html")
    variances = {(row["arm"], row["round"]): row["variance_of_all"] for row in rows}
    assert variances == {
        ("fedavg", 1): 1e-3,
        ("fedavg", 2): 5e-4,
        ("autoflip", 1): 5e-4,
        ("autoflip", 2): 2.5e-4,
    }


def test_texts_of_runs_cannot_leave_the_pages_data(tmp_path):
    for name in ("digits", "</script><b>"):
        folder = write_run(tmp_path / "runs" / str(len(name)))
        written = (folder / "settings.yaml").read_text()
        written = written.replace("name: digits", f"name: '{name}'")
        (folder / "settings.yaml").write_text(written)
    made("fig3", tmp_path / "runs", tmp_path)
    page = (tmp_path / "fig3.html").read_text()
    assert page.count("</script>") == 2
    assert r"data.name=\u003c/script\u003e\u003cb\u003e" in page


def test_figure_2_counts_what_eq_4_keeps_in_value_mode(runs, tmp_path):
    """Of 0, .02, .1, .2, .4, .8 and 0, .02, .1 five, two and one are large enough."""
    text = made("fig2", runs, tmp_path)
    assert rows_of(text) == [
        ["paper-mnist", "9", "1.74", "1.8 (5 kept)", "4.5 (2 kept)", "9 (1 kept)"]
    ]
    spec, bars = drawn(tmp_path / "fig2.html")
    counts = {round(bar["from"], 2): bar["parameters"] for bar in bars}
    assert counts == {0: 2, 0.02: 2, 0.1: 2, 0.2: 1, 0.4: 1, 0.8: 1}
    assert spec["encoding"]["y"]["scale"]["type"] == "log"


def test_a_run_keeps_the_guidance_that_its_mask_was_made_from(tmp_path):
    overrides = (
        "log.guidance=true pruning.score=guidance pruning.normalization=global "
        "pruning.balance=global pruning.vectors=true pruning.gradual-rounds=0 "
        "pruning.floor=0 pruning.units=0 pruning.threshold=0.5"
    )
    go(tmp_path / "run", overrides)
    with np.load(tmp_path / "run" / "guidance.npz") as file:
        guidance = {name: file[name] for name in file.files}
    assert min(values.min() for values in guidance.values()) >= 0
    assert max(values.max() for values in guidance.values()) <= 1
    masks = mask.from_scores(guidance, threshold=0.5, mode="quantile")
    with np.load(tmp_path / "run" / "mask.npz") as file:
        for name in file.files:
            np.testing.assert_array_equal(masks[name], file[name], err_msg=name)


def test_a_method_without_exploration_keeps_no_guidance(tmp_path):
    go(tmp_path / "run", "log.guidance=true strategy.name=random")
    assert (tmp_path / "run" / "mask.npz").exists()
    assert not (tmp_path / "run" / "guidance.npz").exists()


def test_figure_2_says_what_keeps_the_guidance(runs, tmp_path):
    with pytest.raises(DataError, match=r"guidance.npz.*log\.guidance=true"):
        made("fig2", runs / "dense", tmp_path)


def test_table_1_has_the_papers_count_and_that_of_the_compact_network(runs, tmp_path):
    dense, pruned = rows_of(made("table1", runs, tmp_path))
    assert dense[1:4] == ["fedavg", "1.74", "1"]
    assert pruned[1:] == [
        "autoflip",
        "1.74",
        "2",
        "13.25 G / 5.43 G / 41.62 %",
        "8 k",
        "2 k (75.0 %)",
        "6 k (25.0 %)",
    ]
    made("fig9", runs, tmp_path)
    _, bars = drawn(tmp_path / "fig9.html")
    assert [(bar["counted"], bar["operations"]) for bar in bars] == 2 * [
        ("all", 8000),
        ("left", 2000),
        ("compact", 6000),
    ]


def test_table_2_counts_kept_parameters_rounds_and_clients(runs, tmp_path):
    """4 bytes x 500 kept x 2 rounds x 20 clients x 0.25 = 20 kB; dense 40 kB."""
    dense, pruned = rows_of(made("table2", runs, tmp_path, target=0.5))
    assert dense[2:6] == ["58 rounds, 324.43 GB", "0.5", "2", "40 kB"]
    assert pruned[2:6] == ["3 rounds, 189.45 GB", "0.5", "2 ± 0", "20 kB"]


def test_table_3_counts_the_exploration(runs, tmp_path):
    """1000 x 3 explored, 500 x 5 local epochs x 2 rounds x 0.25 trained."""
    dense, pruned = rows_of(made("table3", runs, tmp_path, target=0.5))
    assert dense[2:5] == ["–", "0.5", "2.5 k"]  # noqa: RUF001
    assert pruned[2:5] == ["535 M", "0.5", "4.25 k"]


def test_an_unreached_target_has_no_cost(runs, tmp_path):
    for name in ("table2", "table3"):
        for row in rows_of(made(name, runs, tmp_path, target=0.9)):
            assert row[-2] == "–"  # noqa: RUF001


def test_who_holds_which_classes_is_drawn_from_the_preset(tmp_path, capsys):
    overrides = "data.name=digits strategy.min-nodes=10 data.max-samples=500"
    arguments = ["paper", "fig6", "--overrides", overrides, "--output", str(tmp_path)]
    assert main(arguments) == 0
    page = tmp_path / "fig6.html"
    assert capsys.readouterr().out.strip() == str(page)
    _, rows = drawn(page)
    assert sum(row["samples"] for row in rows) == 500
    held = Counter(row["client"] for row in rows if row["samples"])
    assert held == dict.fromkeys(range(10), 2), "two classes a client"


def test_an_unknown_figure_lists_the_known_and_runs_are_asked_for(runs, tmp_path):
    with pytest.raises(SettingsError, match=r"'fig1'; known: \['drift', 'fig2'"):
        made("fig1", runs, tmp_path)
    with pytest.raises(SettingsError, match=r"table1 needs the folders.*autoflip comp"):
        paper.draw("table1", [], output=tmp_path)


def test_the_papers_own_tables_do_not_follow_from_its_formulas():
    """What the notes under the tables say."""
    femnist, lstm = 13_180_734, 5_040_000
    assert round(femnist * 280 * 25 * 4 / 1e9, 2) == 369.06
    assert round(femnist * 348 * 25 * 4 / 1e9, 2) == 458.69
    assert round(lstm * 243 * 25 * 4 / 1e9, 2) == 122.47
    assert 2150 * femnist == 28_338_578_100
    dense = {7_628_484: 1_428_653_880, 10_838_784: 3_740_891_680}
    dense |= {23_755_900: 9_378_097_500, lstm: 8_335_200_000}
    assert all(processed % parameters for parameters, processed in dense.items())
    assert round(5.43 / 13.25, 2) == 0.41


# --- docs/reproduction.md -----------------------------------------------------------


def commands() -> list[str]:
    text = (ROOT / "docs" / "reproduction.md").read_text().replace("\\\n", " ")
    found = re.findall(r"autoflip (?:compare|paper) (?!NAME)[^`\n|]+", text)
    return [one.replace("PRESET", "paper-mnist").strip() for one in found]


def test_there_is_a_command_for_every_preset_and_later_version():
    text = "\n".join(commands())
    assert all(f"compare paper-{name} --seeds 10" in text for name in PAPERS)
    later = (
        "pruning.units",
        "agreement",
        "prunefl",
        "every",
        "fraction",
        "label-noise",
    )
    assert all(word in text for word in later)


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_reproduction_can_be_planned(command, tmp_path):
    chosen = _parser().parse_args(shlex.split(command)[1:])
    if command.startswith("autoflip paper"):
        assert chosen.name in paper.NAMES
        return
    seeds = plan.parse_seeds(chosen.seeds)
    planned = plan.plan(
        chosen.preset,
        output=tmp_path,
        strategies=chosen.strategies.split(","),
        seeds=seeds,
        vary=plan.parse_vary(chosen.vary),
        overrides=chosen.overrides,
    )
    assert len(planned) >= seeds
