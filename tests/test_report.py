"""The report: complete, self-contained, safe, and pleasant in a real browser."""

import base64
import io
import re
import shutil
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_results import write_run

from autoflip_flwr.cli import main
from autoflip_flwr.compare.report import write_report
from autoflip_flwr.errors import DataError

CHARTS = [
    "accuracy-over-megabytes",
    "accuracy-over-operations",
    "accuracy-by-round",
    "bytes",
    "density-by-layer",
    "mask-change",
    "guidance-cosine",
    "update-variance",
]


def masks(density, seed):
    rng = np.random.default_rng(seed)
    shapes = {"conv1.weight": (8, 1, 3, 3), "conv1.bias": (8,), "fc1.weight": (10, 64)}
    return {name: rng.random(shape) < density for name, shape in shapes.items()}


def write_arm(folder, overrides="", *, density=0.2, seeds=2, top=0.9, **options):
    """Write runs that learn, a little differently from seed to seed."""
    dense = "fedavg" in overrides
    for seed in range(seeds):
        n = np.arange(1, 31)
        noise = np.random.default_rng(seed).normal(0, 0.01, len(n))
        write_run(
            folder.with_name(f"{folder.name}-{seed}"),
            f"{overrides} seed={seed}",
            accuracy=list(map(float, top * (1 - np.exp(-n / 6)) + noise)),
            explore=(0, 0) if dense else (500_000, 125_000),
            sent=(int(1e6 * density), int(1e6 * density), 20_000),
            dense=2_000_000,
            density=density,
            masks=None if dense else masks(density, seed),
            trained=1e9 * density,
            **options,
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Write a report on two arms of five seeds, and one on eight of two."""
    root = tmp_path_factory.mktemp("report")
    write_arm(root / "two" / "dense", "strategy.name=fedavg", density=1.0, seeds=5)
    write_arm(root / "two" / "ours", "", seeds=5)
    for i in range(8):
        threshold = 0.3 + 0.05 * i
        write_arm(
            root / "eight" / f"arm{i:02}",
            f"pruning.threshold={threshold:.2f} pruning.units=0.5 data.alpha=0.3",
            density=1 - threshold,
            top=0.9 - 0.02 * i,
            preset="smoke",
        )
    page = write_report([root / "two", root / "eight"], root / "out")
    return page, page.read_text(encoding="utf-8")


def pictures(text):
    """Return the charts in a page, SVG as text."""
    sources = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="', text)
    return [base64.b64decode(source, validate=True).decode() for source in sources]


def test_every_chart_is_in_the_page_and_a_picture_of_a_sane_size(report):
    page, text = report
    expected = {f"{p}-{c}.png" for p in ("quickstart", "smoke") for c in CHARTS}
    assert {path.name for path in page.parent.glob("*.png")} == expected
    assert len(pictures(text)) == text.count("<figcaption>") == len(expected)
    for svg in pictures(text):
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for path in page.parent.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert 600 < image.width < 900
            assert 150 < image.height < 2500


def without_scripts(text):
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_asks_nothing_of_the_network(report):
    """What its script asks for, a browser tells: see below."""
    text = without_scripts(report[1])
    assert "<script" not in text
    assert "<link" not in text
    assert "@import" not in text
    assert "url(" not in text
    for reference in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", text):
        assert reference.startswith(("#", "data:image/svg+xml;base64,")), reference
    for svg in pictures(text):
        assert "<script" not in svg
        assert "<image" not in svg
        for reference in re.findall(r"""(?:href="|url\()([^)"]*)""", svg):
            assert reference.startswith("#"), reference
    size = len(report[1].encode())
    assert size < 4e6, "Vega is 0.9 MB of it, once"


def test_ids_are_unique_and_references_lead_somewhere(report):
    text = without_scripts(report[1])
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]*)', text):
        assert target in ids


def test_the_page_is_made_for_readers_of_every_kind(report):
    _, text = report
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert len(re.findall(r'alt="[^"]{40,}"', text)) == 2 * len(CHARTS)
    assert text.count("<th ") == text.count('<th scope="'), "every header has a scope"
    assert "@media print" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_the_numbers_and_how_to_read_them(report):
    _, text = report
    for words in (
        "fedavg",
        "autoflip pruning.threshold=0.35",
        "Top-1 of the global model on held-out data",
        "standard error of the mean over seeds",
        "0.99 of the median arm",
        "autoflip run quickstart rounds=30 strategy.name=fedavg",
    ):
        assert words in text, words


def test_the_verdict_comes_first_then_what_accuracy_costs(report):
    charts = [f'data-chart="{name}"' for name in CHARTS[:4]]
    marks = ["x fewer bytes", *charts[:3], "Accuracy and costs", charts[3]]
    places = [report[1].index(mark) for mark in marks]
    assert places == sorted(places)


def test_a_picture_has_the_verdict_and_what_accuracy_costs(report):
    page, text = report
    assert {p.name for p in page.parent.glob("*.svg")} == {
        "quickstart.svg",
        "smoke.svg",
    }
    svg = (page.parent / "quickstart.svg").read_text(encoding="utf-8")
    (verdict,) = re.findall(r'class="verdict">(autoflip: .*?)</p>', text)
    for words in (verdict, "megabytes sent", "multiply-accumulates trained"):
        assert words in svg


def test_a_chart_is_described_by_its_values(tmp_path):
    write_run(
        tmp_path / "run",
        accuracy=(0.25, 0.5, 0.75),
        explore=(1000, 500),
        sent=(100, 100, 50),
        masks={
            # Of layer a 3 of 4 + 0 of 2 are kept, of layer b 1 of 4.
            "a.weight": np.array([True, True, True, False]),
            "a.bias": np.array([False, False]),
            "b": np.array([True, False, False, False]),
        },
    )
    text = write_report([tmp_path / "run"], tmp_path / "out").read_text()
    described = [unescape(alt) for alt in re.findall(r'alt="([^"]*)"', text)]
    assert described == [
        "Accuracy over megabytes. At the end, autoflip: 0.75.",
        "Accuracy by round. At the end, autoflip: 0.75.",
        "Bytes. Sent in all, autoflip: 2.25 kB.",
        "Density by layer. autoflip: a 0.500, b 0.250.",
        "Mask change. At the end, autoflip: 0.03333.",
        "Guidance cosine. At the end, autoflip: 0.3333.",
        "Update variance. At the end, autoflip: 0.0003333.",
    ]


def test_rounds_that_a_seed_does_not_know_are_not_in_the_mean(tmp_path):
    write_run(tmp_path / "runs" / "0", "seed=0", accuracy=(0.2, 0.4, 0.6))
    write_run(tmp_path / "runs" / "1", "seed=1", accuracy=(0.2, 0.6, None))
    text = write_report([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "Accuracy by round. At the end, autoflip: 0.5." in text


def test_two_reports_on_the_same_runs_are_the_same(tmp_path):
    write_arm(tmp_path / "runs" / "a")
    first = write_report([tmp_path / "runs"], tmp_path / "1").read_bytes()
    assert write_report([tmp_path / "runs"], tmp_path / "2").read_bytes() == first


def test_hostile_names_are_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&$x^^1$"
    write_run(tmp_path / "runs" / "a")
    folder = write_run(tmp_path / "runs" / "b")
    written = (folder / "settings.yaml").read_text()
    (folder / "log.txt").write_text("of `compare`, which ran others beside it")
    quoted = "'" + evil.replace("'", "''") + "'"
    written = written.replace("name: digits", f"name: {quoted}")
    (folder / "settings.yaml").write_text(written)
    other = write_run(tmp_path / "runs" / "c" / "<b>folder</b>")
    written = (other / "settings.yaml").read_text()
    (other / "settings.yaml").write_text(
        written.replace("preset: quickstart", "preset: ../../<i>up</i>")
    )
    page = write_report([tmp_path / "runs"], tmp_path / "out" / "deep")
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in text
    assert r"\u003cscript\u003ealert(1)" in text, "in the charts' rows, too"
    for tag in ("<script>alert", "</script>alert", "<i>up", "<b>folder"):
        assert tag not in text
    assert text.count("</script>") == 3, "two sections and the page's own"
    assert text.count("time (measured)") == 1, "only of the run that was alone"
    astray = [p for p in tmp_path.rglob("*.[ps][nv]g") if p.parent != page.parent]
    assert not astray, "a preset's name leads to no other folder"


def test_a_single_run_without_masks_accuracy_or_costs_makes_a_page(tmp_path):
    write_run(
        tmp_path / "run",
        "strategy.name=fedavg",
        accuracy=(None,),
        explore=(0, 0),
        flops={},
        seconds={},
    )
    page = write_report([tmp_path / "run"], tmp_path / "out")
    assert [path.name for path in page.parent.glob("*.png")] == ["quickstart-bytes.png"]


def test_runs_that_sent_and_learned_nothing_make_a_page(tmp_path):
    for name in ("autoflip", "fedavg"):
        write_run(
            tmp_path / "runs" / name,
            f"strategy.name={name} data.name=$x_1漢",
            accuracy=(0.0, 0.0),
            explore=(0, 0),
            sent=(0, 0, 0),
        )
    text = write_report([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "Sent in all, fedavg: 0 B; autoflip: 0 B." in text


def test_no_run_and_a_torn_mask_are_helpful_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="finished runs"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    folder = write_run(tmp_path / "torn")
    (folder / "mask.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(DataError, match=r"torn/mask\.npz"):
        write_report([folder], tmp_path / "out")
    np.savez(folder / "mask.npz", conv1=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(DataError, match=r"torn/mask\.npz: expected.*allow_pickle"):
        write_report([folder], tmp_path / "out")


def test_a_folder_that_is_not_there_is_one_line_with_what_may_be_meant(
    tmp_path, capsys
):
    (tmp_path / "runs").mkdir()
    assert main(["report", str(tmp_path / "rums")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no folder" in said
    assert "did you mean 'runs'?" in said
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert "expected the folders of finished runs" in capsys.readouterr().err


def test_a_target_that_is_asked_for_is_used(tmp_path):
    write_run(tmp_path / "run")
    text = write_report([tmp_path / "run"], tmp_path / "out", 0.5).read_text()
    assert "target accuracy 0.5000" in text
    assert "The accuracy 0.5, as asked for." in text


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(names)})")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


def opened(chromium, page, width, **options):
    """Open the report; return it with what it asked of the network or complained."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
    view, noise = context.new_page(), []

    def watch(route):
        url = route.request.url
        if url == page.as_uri() or url.startswith("data:image/svg+xml;base64,"):
            route.continue_()
        else:
            noise.append(url)
            route.abort()

    context.route("**/*", watch)
    view.on("console", lambda message: noise.append(message.text))
    view.on("pageerror", lambda error: noise.append(str(error)))
    view.goto(page.as_uri(), wait_until="load")
    if options.get("java_script_enabled", True):
        count = 2 * len(CHARTS)
        view.wait_for_function(
            f"document.querySelectorAll('figure svg').length == {count}"
        )
        view.wait_for_function("document.querySelectorAll('.boxes input').length == 12")
    return view, noise


#: The lowest contrast of a text with the page, as WCAG has it.
CONTRAST = """() => {
  const light = (color) => color.match(/[0-9.]+/g).slice(0, 3)
    .map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("body :not(script, style)")].filter((e) =>
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return Math.min(...texts.map((e) => {
    const style = getComputedStyle(e);
    const ink = light(e.closest("svg") ? style.fill : style.color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  }));
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_all_without_network_or_sideways_scroll(
    report, chromium, width, scheme
):
    view, noise = opened(chromium, report[0], width, color_scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [chart.bounding_box() for chart in view.locator("figure svg").all()]
    for box in boxes:
        assert min(290, width - 70) < box["width"] <= width
        assert box["height"] > 80
        assert box["x"] >= 0
    wide = view.locator(".scroll").all()
    assert len(wide) == 4
    for table in wide:
        assert table.bounding_box()["width"] <= width
    ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert view.evaluate(CONTRAST) >= 4.5
    image = Image.open(io.BytesIO(view.locator("figure svg").first.screenshot()))
    colors = image.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 20, "something is drawn"
    white = max(colors)[1] == (255, 255, 255)
    assert white == (scheme == "light"), "on the page's own ground"
    assert noise == []
    view.context.close()


@pytest.mark.slow
def test_values_are_told_arms_are_hidden_lines_smoothed_and_tables_sorted(
    report, chromium
):
    view, noise = opened(chromium, report[0], 1200)
    chart = view.locator("figure svg").first
    lines = chart.locator(".mark-line path[stroke-width='2']")
    assert lines.count() == 2
    chart.locator(".mark-symbol path").nth(5).hover(force=True)
    told = view.locator("#vg-tooltip-element.visible").inner_text()
    assert "autoflip" in told or "fedavg" in told
    assert "top-1 accuracy" in told
    before = lines.first.get_attribute("d")
    view.get_by_label("smooth").first.check()
    assert lines.first.get_attribute("d") != before
    view.get_by_label("fedavg", exact=True).uncheck()
    view.wait_for_function(
        "document.querySelector('figure').querySelectorAll"
        "(\".mark-line path[stroke-width='2']\").length == 1"
    )
    table = view.locator("#quickstart table").first
    column = "rows => rows.map(r => r.cells[3].textContent)"
    assert table.locator("tbody tr").evaluate_all(column) == ["1", "0.2"]
    density = table.locator("th", has_text="Density")
    density.locator("button").click()
    assert density.get_attribute("aria-sort") == "descending"
    density.locator("button").press("Enter")
    assert density.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody tr").evaluate_all(column) == ["0.2", "1"]
    assert noise == []
    view.context.close()


@pytest.mark.slow
def test_without_a_script_the_pictures_show_all(report, chromium):
    view, noise = opened(chromium, report[0], 1200, java_script_enabled=False)
    pictures = view.locator("figure img").all()
    assert len(pictures) == 2 * len(CHARTS)
    assert all(picture.is_visible() for picture in pictures)
    assert noise == []
    view.context.close()


@pytest.mark.slow
def test_on_paper_are_the_pictures_and_nothing_is_cut_off(report, chromium):
    view, noise = opened(chromium, report[0], 794)  # A4 at 96 dpi
    view.emulate_media(media="print")
    assert view.locator("figure img").first.is_visible()
    assert not view.locator("figure svg").first.is_visible()
    assert view.evaluate("document.documentElement.scrollWidth") <= 794
    assert view.pdf().startswith(b"%PDF")
    assert noise == []
    view.context.close()
