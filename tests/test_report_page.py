"""`muse report` and `muse app`: the page says what the run holds, and works in a browser."""

import base64
import io
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy
import pytest
import torch
from PIL import Image

from muse import MUSE_ViT, load_config
from muse.experiments import app
from muse.experiments.run_report import ReportOptions, write_run_report
from muse.experiments.run_report_config import compare_with_paper
from muse.experiments.run_report_html import ReportedModel
from muse.experiments.run_report_model import pack_attention, pca_colours
from muse.experiments.run_report_page import curve_facts
from muse.experiments.run_report_sources import open_run, read_records
from muse.teachers.build import shared_text_teacher
from scripts import app as app_script
from scripts import report
from tests.browser import WHY_NOT, browser
from tests.data.helpers import picture
from tests.helpers import one_error, random_images, tiny_model

VOID = {"meta", "link", "img", "input", "br", "hr"}
PROTOCOL = {"psnr": 12.345, "protocol": {"name": "native", "images": 8, "seed": 0}}


class Page(HTMLParser):
    """Every element, and whether they are nested as HTML demands."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page_file(trained_run, tmp_path_factory):
    """The page about a run and its packaged form, with a metrics.json of another command."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "other.json").write_text(json.dumps(PROTOCOL))
    words = [str(trained_run[1]), str(trained_run[1] / "final")]
    options = ReportOptions(images=3, metrics=(str(folder / "other.json"),))
    return write_run_report(words, folder / "report.html", options)


@pytest.fixture(scope="module")
def text(page_file):
    return page_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def facts_of(page: Page) -> dict:
    return json.loads(next(text for text in page.texts["script"] if text.startswith("{")))


# --------------------------------------------------------------------------------------- the page
def test_the_page_is_whole_html(page, text):
    assert text.startswith("<!doctype html>") and page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert len(targets) >= 8 and set(targets) <= set(ids)
    labelled = {a["aria-labelledby"] for a in page.all("section")}
    assert len(page.all("h1")) == 1 and labelled <= set(ids)
    assert "run: semantic injection to step 2" in page.texts["h1"][0]
    assert "@@" not in text.replace("@@@", "")


def test_nothing_comes_from_elsewhere(page, text):
    assert not re.findall(r"https?://|@import|srcset|\bfetch\(|XMLHttpRequest", text)
    for attributes in [*page.all("img"), *page.all("script"), *page.all("link")]:
        source = attributes.get("src") or attributes.get("href") or "data:"
        assert source.startswith("data:")
    assert len(text) < 8 << 20


def test_every_picture_can_be_decoded_and_has_words(page):
    pictures = page.all("img")
    assert len(pictures) > 20
    for attributes in pictures:
        kind, _, data = attributes["src"].removeprefix("data:image/").partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as opened:
            opened.load()
            assert opened.format == kind.upper() and min(opened.size) >= 1
        assert "alt" in attributes
    assert all(a["aria-label"] for a in page.all("input") if a.get("type") == "range")


def test_the_curves_are_those_of_the_records(page, trained_run):
    lines = (trained_run[1] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (run,) = facts_of(page)["curves"]["runs"]
    assert run["steps"] == [1, 2]
    for name in ("loss", "topology", "itc", "lr"):
        assert run["values"][name] == [record[name] for record in records]
    shown = {text for text in page.texts["td"]}
    assert {f"{records[0]['loss']:.5g}", f"{records[1]['loss']:.5g}"} <= shown


def test_pictures_and_psnr_are_the_model_s(page, text, trained_run):
    model = MUSE_ViT.from_pretrained(trained_run[1] / "final")
    sources = [a["src"] for a in page.all("img") if a["alt"].startswith(("original", "recon"))]
    assert len(sources) == 2 * 2 * 3  # run and model, three pictures
    opened = [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources[:2]]
    recon, original = (torch.from_numpy(numpy.array(one)).permute(2, 0, 1) / 255 for one in opened)
    with torch.no_grad():
        again = model.reconstruct(original[None].float())[0]
    assert (again - recon).abs().mean() < 0.03  # JPEG twice
    stated = float(re.search(r"PSNR (-?[\d.]+) dB", text)[1])
    error = (recon.double() - original.double()).square().mean()
    assert abs(stated - float(-10 * error.log10())) < 0.6


def test_attention_is_the_model_s_within_a_byte():
    encoding = tiny_model().encode(random_images(1), return_attention=True)
    attention = encoding.topology[0][0].mean(0).detach()
    packed = pack_attention("block 1", attention)
    count = len(attention)
    read = numpy.frombuffer(base64.b64decode(packed.weights), numpy.uint8).reshape(count, count)
    restored = read / 255 * numpy.array(packed.peaks)[:, None]
    expected = attention.numpy().copy()
    numpy.fill_diagonal(expected, 0)
    assert numpy.abs(restored - expected).max() <= expected.max() / 510 + 1e-5
    assert (read.max(1) == 255).all() and (numpy.diag(read) == 0).all()


def test_the_page_holds_attention_of_every_block_and_the_teacher(page):
    run, model = facts_of(page)["attention"]
    labels = [one["label"] for one in run["maps"][0]]
    assert labels == ["block 1", "block 2", "teacher"] and len(run["maps"]) == 3
    count = math.prod(run["grid"])
    for one in run["maps"][0]:
        assert len(base64.b64decode(one["weights"])) == count**2 and len(one["peaks"]) == count
    assert [one["label"] for one in model["maps"][0]] == labels  # final/ lies in its run


def test_colours_are_the_principal_components():
    decomposition = pytest.importorskip("sklearn.decomposition")
    torch.manual_seed(3)
    features = torch.randn(2, 5, 4, 3) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.1]).view(1, 5, 1, 1)
    cells = features.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    expected = decomposition.PCA(3).fit_transform(cells)
    colours = pca_colours(features).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    for place in range(3):
        inside = (colours[:, place] > 0) & (colours[:, place] < 1)  # what is not cut off
        slope = numpy.corrcoef(expected[inside, place], colours[inside, place])[0, 1]
        assert abs(slope) > 0.9999


def test_captions_are_ranked_by_cosine(trained_run):
    config, run = trained_run
    written = Page(_report([run], run.parent / "captions.html", images=2))
    said = next(t for t in written.texts["figcaption"] if t.startswith("own caption ranks"))
    cfg, model = load_config(config), MUSE_ViT.from_pretrained(run / "final")
    import muse.data.dataloader as loading  # noqa: PLC0415 - beside its only use

    batches = loading.build_eval_loader(cfg, fields=("images", "text"), max_images=8)
    images, texts = [], []
    for batch in batches:
        images.append(batch["images"])
        texts += batch["text"]
    choices = list(dict.fromkeys(texts))
    encode = shared_text_teacher(cfg).encode
    with torch.no_grad():
        image = model.embed_image(torch.cat(images)[:1])[0]
        scores = [float(image @ encode([choice])[0]) for choice in choices]
    better = sum(score > scores[choices.index(texts[0])] for score in scores)
    assert said == f"own caption ranks {better + 1} of {len(choices)}"


def test_metrics_stand_beside_their_protocol(page):
    cells = page.texts["td"] + page.texts["th"]
    assert {"12.345", "native", "other"} <= set(cells)
    rows = [code for code in page.texts["code"] if code == "seed"]
    assert rows


def _report(runs, output, **options) -> str:
    words = [str(run) for run in runs]
    return write_run_report(words, output, ReportOptions(**options)).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- records, differences
def test_resumed_runs_gaps_and_a_cut_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    values = [(1, 5.0), (2, 4.0), (3, 9.0), (4, 9.5), (3, 3.0), (4, float("nan")), (5, 2.0)]
    lines = [json.dumps({"step": step, "loss": value}) for step, value in values]
    lines.append(json.dumps({"step": 5, "eval": {"psnr": 20.5}}))
    file.write_text("\n".join([*lines, '{"step": 6, "lo']))
    records, replaced = read_records(file)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5] and replaced == 2
    run = open_run(str(tmp_path))
    facts = curve_facts([ReportedModel(run, None, "")])
    assert facts["runs"][0]["values"]["loss"] == [5.0, 4.0, 3.0, None, 2.0]
    assert facts["runs"][0]["values"]["eval/psnr"] == [None, None, None, None, 20.5]
    assert facts["first"] == ["loss", "eval/psnr"]


def test_a_long_curve_keeps_its_ends_and_its_evaluations(tmp_path):
    records = [{"step": step, "loss": 1.0 * step} for step in range(1, 5001)]
    records[2344]["eval"] = {"psnr": 30.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    facts = curve_facts([ReportedModel(open_run(str(tmp_path)), None, "")])
    steps = facts["runs"][0]["steps"]
    assert steps[0] == 1 and steps[-1] == 5000 and 2345 in steps and len(steps) <= 1202
    assert facts["runs"][0]["values"]["loss"] == [float(step) for step in steps]


def test_differences_from_the_paper(tmp_path):
    found = compare_with_paper(open_run("muse_tiny"))
    differences = {one.key: (one.ours, one.paper) for one in found.differences}
    assert differences["model.num_blocks"] == ("4", "6")
    assert differences["model.dim"] == ("192", "512")
    assert differences["teacher.topology.kind"] == ("affinity", "dinov3")
    assert "model.routing" not in differences
    assert not [key for key in differences if key.startswith("experiment.")]
    assert all(here == there for _, _, here, there in found.routing)


def test_routing_that_is_not_the_paper_s_is_marked(tmp_path):
    tiny_model(routing="release").save_pretrained(tmp_path / "saved")
    found = compare_with_paper(open_run(str(tmp_path / "saved")))
    marked = {(loss, group): (here, there) for loss, group, here, there in found.routing}
    # docs/fidelity.md: the paper's losses of structure and of semantics read every block, the
    # release's the last one alone.
    assert marked["topology", "W_QK"] == ("last block", "all blocks")
    assert marked["itc", "W_ITC"] == ("last block", "all blocks")
    assert marked["reconstruction", "W_QK"] == ("–", "–")  # attention is shielded in both


# ---------------------------------------------------------------------------------- other runs
def test_a_run_without_weights_and_its_pictures(tmp_path):
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    picture(1, 40, 30).save(folder / "images/samples.png")
    (folder / "images/broken.png").write_bytes(b"no picture")
    (folder / "config.yaml").write_text("generator: {depth: 2}\ntraining: {seed: 0}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "velocity": 0.5}\n')
    page = Page(_report([folder], tmp_path / "report.html"))
    assert [a["alt"] for a in page.all("img")] == ["images/samples.png"]
    assert facts_of(page)["curves"]["first"] == ["velocity"]
    assert any("another kind" in text for text in page.texts["p"])


MISTAKES = {
    "no such run": (lambda t: [str(t / "none")], "none: no such run or model"),
    "a near name": (lambda t: ["muse_tini"], "did you mean muse_tiny?"),
    "a file": (lambda t: [str(t / "file.txt")], "file.txt: a file; name the directory"),
    "an empty directory": (lambda t: [str(t / "empty")], "empty: not a run"),
    "a directory of runs": (lambda t: [str(t / "demo")], "holds the runs stage1"),
    "broken records": (lambda t: [str(t / "broken")], "metrics.jsonl: line 2 is no JSON object"),
    "no records": (lambda t: [str(t / "bare")], "metrics.jsonl: holds no records"),
    "broken configuration": (lambda t: [str(t / "text")], "config.yaml: not readable as YAML"),
    "no such pictures": (lambda t: ["muse_tiny", "--data", str(t / "none.jpg")], "none.jpg: no"),
    "no picture": (lambda t: ["muse_tiny", "--images", "0"], "--images must be at least 1"),
    "metrics that are none": (
        lambda t: ["muse_tiny", "--metrics", str(t / "file.txt")],
        "file.txt: not readable as JSON",
    ),
    "a checkpoint for two": (
        lambda t: ["muse_tiny", "muse_tiny", "--checkpoint", "x"],
        "go with one RUN",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_no_page(mistake, tmp_path, capsys):
    words, said = MISTAKES[mistake]
    for name in ("empty", "demo/stage1", "broken", "bare", "text"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "demo/stage1/config.yaml").write_text("a: 1")
    (tmp_path / "text/config.yaml").write_text("a: [")
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    (tmp_path / "bare/metrics.jsonl").write_text("")
    output = tmp_path / "out.html"
    line = one_error(capsys, report.main([*words(tmp_path), "--output", str(output)]))
    assert said in line and not output.exists()


# ----------------------------------------------------------------------------------- the live page
@pytest.fixture(scope="module")
def live(trained_run):
    return app.open_live_model(str(trained_run[1]))


def test_the_live_page_s_functions(live, trained_run):
    photo = numpy.array(picture(5, 53, 37).convert("RGB"))
    recon, sentence = live.reconstruct(photo)
    assert recon.shape == photo.shape and "53×37 pixels" in sentence
    error = ((photo / 255.0 - recon / 255.0) ** 2).mean()
    assert abs(float(re.search(r"PSNR ([\d.]+)", sentence)[1]) + 10 * math.log10(error)) < 0.1
    maps = live.attention(photo, (0.1, 0.9))
    assert [label for _, label in maps] == ["block 1", "block 2"]
    assert maps[0][0].shape == (32, 32, 3)
    shares = live.nearest_labels(photo, "a cat, a dog;a house\na cat")
    assert list(shares) == ["a cat", "a dog", "a house"]
    assert math.isclose(sum(shares.values()), 1, abs_tol=1e-5)
    scale = MUSE_ViT.from_pretrained(trained_run[1] / "final").logit_scale.exp().item()
    text = shared_text_teacher(live.cfg)
    means = []
    for label in ("a cat", "a dog"):
        rows = text.encode([prompt.format(label) for prompt in app.PROMPTS])
        means.append(torch.nn.functional.normalize(rows.mean(0), dim=0))
    image = live.model.embed_image(app.square(app.to_image(photo), live.side)[None])[0]
    ratio = math.exp(scale * float(image.detach() @ (means[0] - means[1])))
    assert math.isclose(shares["a cat"] / shares["a dog"], ratio, rel_tol=1e-3)


def test_a_click_falls_into_the_middle_square():
    assert app.clicked_place((50, 20), (40, 100)) == (0.5, 0.5)
    assert app.clicked_place((0, 0), (40, 100)) == (0.0, 0.0)
    assert app.clicked_place((99, 39), (40, 100)) == (0.975, 0.9999)


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, live, trained_run, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = one_error(capsys, app_script.main([str(trained_run[1]), "--device", "cpu"]))
    assert "pip install 'muse-tokenizer[app]'" in line


def test_labels_that_cannot_be_ranked(live):
    photo = numpy.zeros((32, 32, 3), numpy.uint8)
    with pytest.raises(app.ConfigError, match="type one or more labels"):
        live.nearest_labels(photo, " , ;\n")
    with pytest.raises(app.ConfigError, match="no text tower"):
        app.LiveModel(tiny_model(), None).nearest_labels(photo, "a cat")


# ------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def window(page_file, tmp_path_factory):
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(window, page_file):
    window.size(1000, 800)
    window.open(page_file.as_uri())
    return window


CUT = "return getComputedStyle(arguments[0].parentElement).getPropertyValue('--cut')"
PRESSED = (
    "return [...document.querySelectorAll('.patches')[0].children]"
    ".findIndex((one) => one.ariaPressed === 'true')"
)
MAP = "return document.querySelector('.maps canvas').toDataURL()"


@pytest.mark.parametrize(("width", "dark"), [(360, False), (820, False), (1280, True)])
def test_no_console_error_no_overflow_and_every_picture_loads(width, dark, window, page_file):
    window.size(width, 800, dark)
    window.open(page_file.as_uri())
    window.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    window.run("return new Promise((done) => setTimeout(done, 300))")
    assert window.run("return document.documentElement.dataset.ready") == "yes"
    widths = window.run("return [...document.images].map((one) => one.naturalWidth)")
    assert len(widths) > 20 and min(widths) > 0
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run("return document.querySelectorAll('.chart svg path').length") >= 5
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    level = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert level < 60 if dark else level > 200
    assert window.console_errors() == []


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_slider_is_dragged(kind, shown):
    slider = shown.find(".pair input")
    shown.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
    assert shown.run(CUT, slider) == "50%"
    width = shown.run("return arguments[0].clientWidth", slider)
    shown.press(kind, slider, to=width // 4)
    assert 65 <= int(shown.run(CUT, slider).rstrip("%")) <= 85


def test_a_slider_by_keys(shown):
    slider = shown.find(".pair input")
    shown.run("arguments[0].focus()", slider)
    shown.keys("Right", "Right", "Right", "Left")
    assert shown.run(CUT, slider) == "52%"
    clip = shown.run("return getComputedStyle(document.querySelector('.before')).clipPath")
    assert "48%" in clip  # the original is cut off at the right


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_patch_is_chosen(kind, shown):
    before = shown.run(MAP)
    patch = shown.find(".patches button:nth-child(2)")
    shown.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", patch)
    shown.press(kind, patch)
    assert shown.run(PRESSED) == 1 and shown.run(MAP) != before
    reading = shown.run("return document.querySelector('.reading').textContent")
    assert reading.startswith("From row 1, column 2.") and "teacher" in reading


def test_a_patch_by_keys(shown):
    first = shown.run(PRESSED)
    shown.run("document.querySelector('.patches button[tabindex=\"0\"]').focus()")
    shown.keys("Up", "Left", "Enter")
    columns = shown.run(
        "return JSON.parse(document.getElementById('facts').textContent).attention[0].grid[1]"
    )
    assert shown.run(PRESSED) == first - columns - 1


def test_the_curves_have_a_logarithmic_axis_and_a_cursor(shown):
    read = "return document.querySelector('.chart .readout').textContent"
    ticks = "return [...document.querySelectorAll('.chart svg')[0].querySelectorAll('text')]"
    ticks += ".map((one) => one.textContent)"
    linear = shown.run(ticks)
    shown.run("document.getElementById('logarithmic').click()")
    low, middle, high = map(float, shown.run(ticks)[:3])
    assert math.isclose(middle, math.sqrt(low * high), rel_tol=0.01) and linear[0] == f"{low:g}"
    assert shown.run(read).startswith("step 2:")
    shown.run("document.querySelector('.chart [tabindex]').focus()")
    shown.keys("Left")
    assert shown.run(read).startswith("step 1:")
    shown.run("document.querySelector('[data-toggle]').click()")
    assert "no" in shown.run(read)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
def test_the_live_page_in_a_browser(live, tmp_path, tmp_path_factory):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    picture(5, 53, 37).save(tmp_path / "photo.png")
    page = app.build_app(live, "test")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with browser(tmp_path_factory.mktemp("live")) as window:
            window.size(1000, 900)
            window.open(address)
            _wait(window, "return document.querySelectorAll('input[type=file]').length")
            window.upload(window.find("input[type=file]"), tmp_path / "photo.png")
            words = "return document.body.innerText.includes('53×37 pixels, PSNR')"
            assert _wait(window, words)
            assert _wait(window, "return document.body.innerText.includes('block 2')")
    finally:
        page.close()


def _wait(window, script: str):
    for _ in itertools.repeat(None, 240):
        if found := window.run(script):
            return found
        window.run("return new Promise((done) => setTimeout(done, 250))")
    raise AssertionError(f"never true: {script}")
