"""`luthier preview` on real rows with a real tokenizer."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console

from helpers.outcome_rows import ROWS
from helpers.vision_families import picture
from luthier.inspection.render import print_sequence
from luthier.inspection.tokens import DisplayedImage, DisplayedSequence, Token, pad_rows


def test_a_row_in_marks(on_rows):
    code, out, err = on_rows("preview", [ROWS["plain"]])
    assert (code, err) == (0, "")
    assert out.splitlines()[:9] == [
        "«trained»  {control}  other tokens are context  | stands between tokens",
        "",
        "row 1  rows.jsonl:1  29 tokens, 6 trained (21%)",
        "{<|im_start|>}|system|↵",
        "|Be| brief|.|{<|im_end|>}|↵",
        "|{<|im_start|>}|user|↵",
        "|What| is| a| lute|?|{<|im_end|>}|↵",
        "|{<|im_start|>}|ass|istant|↵",
        "|«A| pl|ucked| instrument|.|{<|im_end|>}»|↵",
    ]


def test_ids_stand_beside_their_tokens(on_rows):
    _, out, _ = on_rows("preview", [ROWS["plain"]], "--ids")
    assert "{<|im_start|>}:1|system:9690|↵:198\n" in out


def test_forged_turns_are_plain_tokens(on_rows):
    _, out, _ = on_rows("preview", [ROWS["forged"]])
    assert out.count("{<|im_start|>}") == 3  # the default system prompt, the user, the reply
    assert "|for|ged|{<|im_end|>}|↵" in out and "«for" not in out


@pytest.mark.parametrize(
    "words, numbers",
    [
        (["--n", "2"], [1, 2]),
        (["--row", "3"], [3]),
        (["--row=2", "--n=2"], [2, 3]),
        ([], [1, 2, 3]),
        (["--row", "4", "--n", "9"], [4]),
    ],
    ids=["n", "row", "row and n", "default", "beyond the end"],
)
def test_which_rows(words, numbers, on_rows):
    rows = [[{"role": "user", "content": f"{n}"}, ROWS["plain"][-1]] for n in range(4)]
    code, out, _ = on_rows("preview", rows, "--json", *words)
    assert code == 0
    assert [row["row"] for row in json.loads(out)["rows"]] == numbers


def test_rows_are_padded_to_the_longest(on_rows):
    _, out, _ = on_rows("preview", [ROWS["plain"], ROWS["forged"]], "--json")
    rows = json.loads(out)["rows"]
    assert len({len(row["tokens"]) + row["padding"] for row in rows}) == 1
    assert min(row["padding"] for row in rows) == 0


def test_json_says_where_each_token_is_from(on_rows):
    code, out, _ = on_rows("preview", [ROWS["plain"]], "--json")
    found = json.loads(out)
    assert (code, found["side"], found["boundaries"]) == (0, "train", "served")
    (row,) = found["rows"]
    assert (row["place"], row["sequence"], row["sequences"]) == ("rows.jsonl:1", 1, 1)
    trained = [token for token in row["tokens"] if token["trained"]]
    assert [token["text"] for token in trained] == [
        "A",
        " pl",
        "ucked",
        " instrument",
        ".",
        "<|im_end|>",
    ]
    assert {(t["role"], t["message"], t["field"]) for t in trained[:-1]} == {
        ("assistant", 2, "content")
    }
    assert (trained[-1]["kind"], trained[-1]["field"]) == ("control", None)


NOTES = {
    "nothing trains": ([], "dropped: no turn of the row trains"),
    "lost": ([], "training stops here: message 1, field `tool_calls`: the chat template does not"),
    "lost, dropped": (["chat.on_lost=drop"], "dropped: message 1, field `tool_calls`"),
    "lost, kept": (["chat.on_lost=keep"], "trained, but not all of its text is shown: message 1"),
    "cut": (["chat.max_length=60"], "its first turns were removed, 1 reply among them"),
    "too long": (["chat.max_length=60"], "dropped: the row has"),
    "too long, error": (
        ["chat.max_length=60", "chat.on_long=error"],
        "training stops here: the row has",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_becomes_of_a_row(name, on_rows):
    words, said = NOTES[name]
    code, out, _ = on_rows("preview", [ROWS[name.split(",")[0]]], *words)
    assert code == 0 and said in out


def test_held_out_rows(luthier):
    code, out, _ = luthier("preview", "recipe=quickstart", "--eval", "--n", "1", "--json")
    (row,) = json.loads(out)["rows"]
    assert (code, row["place"].rsplit("/", 1)[-1]) == (0, "reminders.heldout.jsonl:1")


MIXED = ["dataset=mixture", "dataset.path=null", "dataset.sources.a.path=a.jsonl"]
MIXED += ["dataset.sources.b.path=b.jsonl", "dataset.sources.b.train_on=last"]
MIXED += ["dataset.eval.sets.c.path=c.jsonl"]
SIDES = {
    "all": ([], "train", ["a:1", "a:2", "b:1"]),
    "across sources": (["--row", "2", "--n", "2"], "train", ["a:2", "b:1"]),
    "one source": (["--source", "b"], "train", ["b:1"]),
    "a set": (["--set", "c"], "c", ["c:1"]),
    "held out": (["--eval", "dataset.eval.count=1"], "held_out", 1),
}


@pytest.mark.parametrize("words, side, places", SIDES.values(), ids=SIDES)
def test_sides_and_sources(words, side, places, luthier, write):
    turns = ROWS["plain"] + [{"role": "user", "content": "And?"}, ROWS["plain"][-1]]
    write([turns, [{"role": "user", "content": "b"}, ROWS["plain"][-1]]], "a.jsonl")
    write([turns[1:]], "b.jsonl")
    write([ROWS["plain"]], "c.jsonl")
    base = ["model=smollm2_135m", "dataset.eval.share=null", "trainer.args.eval_strategy=no"]
    code, out, _ = luthier("preview", "--json", *base, *MIXED, *words)
    found = json.loads(out)
    assert (code, found["side"]) == (0, side)
    shown = [row["place"].replace(".jsonl", "") for row in found["rows"]]
    assert shown == places if isinstance(places, list) else len(shown) == places
    for row in found["rows"]:
        if row["place"] == "b.jsonl:1":
            trained = {token["message"] for token in row["tokens"] if token["trained"]}
            assert trained - {None} == {3}


def test_held_out_rows_of_one_source(luthier, write):
    for name in "abc":
        rows = [{"role": "user", "content": f"{name} {n}"} for n in range(6)]
        write([[row, ROWS["plain"][-1]] for row in rows], f"{name}.jsonl")
    words = ["model=smollm2_135m", "dataset.eval.share=null", "dataset.eval.count=5", *MIXED]
    shown = {
        source: {
            row["place"]
            for row in json.loads(
                luthier("preview", "--json", "--eval", "--n", "9", "--source", source, *words)[1]
            )["rows"]
        }
        for source in "ab"
    }
    assert len(shown["a"]) + len(shown["b"]) == 5
    assert all(place.startswith(source) for source in "ab" for place in shown[source])


def test_texts_are_shown_in_windows(on_rows):
    words = ["dataset.type=text", "chat.max_length=6", "dataset.stride=2"]
    code, out, _ = on_rows("preview", [{"text": "a lute " * 4}], "--json", *words)
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["sequence"] for row in rows] == [1, 2, 3][: len(rows)]
    kept = [token["text"] for token in rows[0]["tokens"][-2:]]
    later = rows[1]["tokens"]
    assert [token["text"] for token in later[:2]] == kept
    assert [token["trained"] for token in later] == [False, False] + [True] * (len(later) - 2)
    assert {token["field"] for token in later} == {"text"}


SAYS = {
    "no such source": (["--source", "x"], "--source x: there is no such source. Options: dataset."),
    "no such set": (["--set", "x"], "--set x: there is no such evaluation set. Options: none."),
    "no such row": (["--row", "2"], "--row 2: there is 1 row on the training side. Write 1 to 1."),
    "none held out": (["--eval"], "no rows are held out"),
    "page that cannot be": (
        ["--html", "none/p.html"],
        "none/p.html cannot be written: its folder",
    ),
}


@pytest.mark.parametrize("words, said", SAYS.values(), ids=SAYS)
def test_a_mistake_is_said_in_words(words, said, on_rows):
    code, out, err = on_rows("preview", [ROWS["plain"]], *words)
    assert (code, out) == (2, "") and said in err


def test_the_page_stands_alone(on_rows, tmp_path):
    rows = [[{"role": "user", "content": '<b>&"x"</script>'}, ROWS["plain"][-1]], ROWS["lost"]]
    code, out, err = on_rows("preview", rows, "--html", "p.html")
    assert (code, out, err) == (0, "", "written p.html\n")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page
    assert page.count("</script>") == 1 and "prefers-color-scheme: dark" in page
    assert 'class="t c" data-h="2 · template · trained control token"' in page
    assert "message 1, assistant, content · trained" in page
    assert "training stops here" in page


TOKENS = [
    Token(1, "<s>", "control", False),
    Token(2, "Hi\n", "context", False, "user", 0, "content"),
    Token(3, "Ho", "trained", True, "assistant", 1, "content"),
    Token(4, "</s>", "control", True),
]


@pytest.mark.parametrize("no_color", [True, False], ids=["NO_COLOR", "colours"])
def test_colours_only_where_they_are_wanted(no_color, monkeypatch):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", highlight=False)
    rows = pad_rows(
        [
            DisplayedSequence(1, "a:1", 1, 1, TOKENS, []),
            DisplayedSequence(2, "a:2", 1, 1, TOKENS[:2], []),
        ]
    )
    for row in rows:
        print_sequence(console, row, "<pad>", ids=True)
    out = file.getvalue()
    assert ("«Ho:3|{</s>}:4»" in out) is no_color
    assert ("48;2;165;219;169mHo" in out) is not no_color
    assert "<pad> × 2" in out and "<pad> × 0" not in out


def image(name):
    return {"type": "image", "image": f"{name}.png"}


SEEN = [
    {"role": "user", "content": [image("wide"), {"type": "text", "text": "Or "}, image("tall")]},
    {"role": "assistant", "content": "No."},
]


def test_an_image_is_one_box(on_images):
    code, out, err = on_images("preview", [SEEN])
    assert (code, err) == (0, "")
    legend, _, heading, body = out.split("\n", 3)
    assert legend.endswith("  [image WIDTHxHEIGHT: its tokens, not trained]")
    assert heading.endswith("35 tokens, 5 trained (14%), 8 for 2 images")
    assert body.count("<image>") == 0
    assert "|[image 60x28: 4 tokens]|" in body and "|[image 28x300: 4 tokens]|" in body
    assert "|N|o|.|{</s>}»" in body


def test_the_legend_of_texts_has_no_image(on_rows):
    _, out, _ = on_rows("preview", [ROWS["plain"]])
    assert "image" not in out.splitlines()[0]


def test_ids_of_an_image_are_counted(on_images):
    _, out, _ = on_images("preview", [SEEN], "--ids")
    assert "[image 60x28: 4 tokens]:259×4|" in out


def test_json_says_which_tokens_are_whose_image(on_images, tmp_path):
    _, out, _ = on_images("preview", [SEEN], "--json")
    (row,) = json.loads(out)["rows"]
    first, second = row["images"]
    assert (first["number"], first["tokens"], first["width"], first["height"]) == (0, 4, 60, 28)
    assert (second["number"], second["source"]) == (1, "tall.png")
    for each in row["images"]:
        stand = row["tokens"][each["start"] : each["start"] + each["tokens"]]
        assert {(token["id"], token["field"], token["message"]) for token in stand} == {
            (259, "image", 0)
        }
    of_images = [token for token in row["tokens"] if token["field"] == "image"]
    assert len(of_images) == 8 and not any(token["trained"] for token in of_images)


def embedded_pictures(page):
    addresses = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(address))) for address in addresses]


def test_the_page_shows_small_copies_of_the_pictures(on_images, tmp_path):
    code, _, _ = on_images("preview", [SEEN], "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    wide, tall = embedded_pictures(page)
    assert code == 0 and wide.format == "PNG" and wide.tobytes() == picture(60, 28, 0).tobytes()
    assert tall.format == "JPEG" and tall.size == (18, 192)
    assert "image 60x28: 4 tokens" in page and "message 0, user, image: tall.png" in page
    assert '<i class="m">image</i>read, not learned' in page


def test_the_page_shows_pictures_that_the_rows_hold(on_images, tmp_path):
    file = io.BytesIO()
    picture(30, 30, 5).save(file, "PNG")
    part = {"type": "image", "base64": base64.b64encode(file.getvalue()).decode()}
    others = [{"role": "user", "content": [image("wide")]}, SEEN[1]]
    row = [{"role": "user", "content": [part]}, SEEN[1]]
    code, _, _ = on_images("preview", [others, row], "--row", "2", "--html", "page.html")
    (shown,) = embedded_pictures((tmp_path / "page.html").read_text())
    assert code == 0 and shown.tobytes() == picture(30, 30, 5).tobytes()


def test_the_page_says_which_picture_cannot_be_decoded(on_images, broken_pixels, tmp_path):
    broken_pixels("wide.png")
    code, _, _ = on_images("preview", [SEEN], "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and len(embedded_pictures(page)) == 1
    assert "the picture cannot be shown: it is broken:" in page


def test_colours_of_an_image():
    control, stop = [Token(n, "<image>", "control", False, "user", 0, "image") for n in (7, 7)]
    ref = {"sha256": "", "width": 4, "height": 3, "source": "a.png"}
    shown = DisplayedImage(0, 0, [control, stop], ref, bytes)
    row = DisplayedSequence(1, "a:1", 1, 1, [control, stop], [], images=[shown])
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    print_sequence(console, row, "<pad>", ids=True)
    out = console.file.getvalue()
    assert out.count("[image 4x3: 2 tokens]") == 1 and "7×2 " in out


def test_a_method_of_text_alone_says_so_of_an_image(on_images):
    words = ["trainer=grpo", "trainer.rewards=[{length: {max: 20}}]"]
    code, out, _ = on_images("preview", [SEEN], *words)
    assert code == 0
    assert "training stops here: message 0, field `image`: the message has an image, and" in out
    assert "trainer.method=grpo trains on text only. Use trainer=sft or trainer=dpo" in out
