"""Words of a list are found however they are written, and in no other word; both users agree."""

import asyncio
import time
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpo_ray.keywords import KeywordFileError, KeywordList, fold
from vpo_ray.recipe import Rules
from vpo_ray.serve.safety import Keywords
from vpo_ray.stages.curate import rules

INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2063\u2066\u2069\u3164"
    "\ufe00\ufe0f\ufeff\uffa0\x00\x08\U000e0001\U000e0041\U000e007f\U000e0100"
)
WORDS = [
    "gore",
    "naked man",
    "裸体",
    "Café",
    "AV女优",
    "เปลือย",
    "ちんこ",
    "обнажённая",
    "c++",
    "f*ck",
    "🔪",
    "18+",
]


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("裸体", "一个裸体女人"),
        ("エロ", "すごいエロ動画"),
        ("ガン", "ｶﾞﾝ"),
        ("เปลือย", "ผู้หญิงเปลือยกาย"),
        ("ເປືອຍ", "ຜູ້ຍິງເປືອຍກາຍ"),
        ("អាក្រាត", "ស្ត្រីអាក្រាតកាយ"),
        ("ဝတ်လစ်", "မိန်းမဝတ်လစ်စလစ်"),
        ("gore", "一个gore的场景"),
        ("AV女优", "看AV女优吧"),
        ("AV女优", "看 av 女优 吧"),
        ("AV 女优", "看AV女优吧"),
        ("裸体 女人", "一个裸体女人"),
        ("nude", "a nüdé man"),
        ("nude", "a n\u0336u\u0336d\u0336e\u0336 man"),
        ("nüde", "a nude man"),
        ("Đảng", "dang"),
        ("smørbrod", "SMORBRØD"),
        ("straße", "STRASSE"),
        ("кровь ещё", "кровь, еще!"),
        ("عارية", "عَارِيَةٌ"),
        ("عارية", "عـــارية"),
        ("ערום", "עָרוֹם"),
        ("gore", "ＧＯＲＥ"),
        ("gore", "𝖌𝖔𝖗𝖊 and more"),
        ("gore", "ⓖⓞⓡⓔ"),
        ("gore", "ɢᴏʀᴇ"),
        ("gore", "🅖🅞🅡🅔"),
        ("gore", "ᵍᵒʳᵉ"),
        ("ﬁsting", "fisting"),
        ("gore", "#gore"),
        ("gore", "gore_scene"),
        ("gore", "(gore)🔪"),
        ("ice cream", "an ICE-cream"),
        ("ice-cream", "ice\u00a0\n\u3000cream"),
        ("o'neil", "O\u2019Neil"),
        ("c++", "written in C++."),
        ("c#", "written in C#"),
        ("f*ck", "oh F*CK!"),
        ("🔪", "a man🔪!"),
        ("🖕", "🖕🏽"),
        ("❤️", "I ❤ it"),
        ("18+", "18+ only"),
        ("नग्न", "एक नग्न आदमी"),
        ("누드", "그 누드 사진"),
    ],
)
def test_a_term_is_found(term: str, text: str) -> None:
    assert KeywordList([term]).find(text) is not None
    assert KeywordList(["other", term, term + "x"]).find(text) is not None


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("ass", "class, assassin, grass"),
        ("ass", "as s"),
        ("ass", "ass2"),
        ("ice cream", "cream on ice, ice creams, icecream"),
        ("AV女优", "xAV女优"),
        ("女优A", "女优AV"),
        ("裸体", "裸 体"),
        ("ガン", "カン"),
        ("मन", "नमन"),
        ("c++", "vitamin c"),
        ("c#", "c"),
        ("🔪", "a knife"),
        ("gore", ""),
    ],
)
def test_another_word_is_not(term: str, text: str) -> None:
    assert KeywordList([term]).find(text) is None


@settings(max_examples=40)
@given(st.sampled_from(WORDS), st.data())
def test_nothing_invisible_hides_a_term_nor_makes_one(term: str, data: st.DataObject) -> None:
    words = KeywordList(WORDS)
    for text in (f"see {term}, there", f"x{term}x", "a classic film about assassins"):
        parts = [c + data.draw(st.text(INVISIBLE, max_size=2)) for c in text]
        assert words.find("".join(parts)) == words.find(text)
    assert words.find(f"see {term}, there") is not None


@given(st.text(st.characters(codec="utf-8"), max_size=12))
@example("ǰ\u0345İſẞ\u1e9eΐ")
@example("\u3164\uffa0\u1160")
def test_forms_of_a_text_count_as_the_same(text: str) -> None:
    folded = fold(text)
    assert fold(folded) == folded
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, text)) == folded  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=3), max_size=5),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=8),
    st.sampled_from([" ", "\t\n ", "\u3000", ", "]),
)
def test_words_are_whole_and_phrases_in_order(phrases: list[list[str]], text: list[str], gap: str) -> None:
    found = KeywordList(gap.join(phrase) for phrase in phrases).find(gap.join(text))
    windows = {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    assert (found is not None) == any(tuple(phrase) in windows for phrase in phrases)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffgore\r\n# a comment\n\n  \n---\nnaked  man # two words\nc#\n裸体".encode())
    words = KeywordList.read(path)
    assert words.size == 4
    assert [words.find(t) for t in ("Gore", "naked\nman", "c#", "裸体画", "a comment")] == [
        "gore", "naked man", "c#", "裸体", None,
    ]  # fmt: skip
    for content, told in ((b"# nothing\n---\n", "holds no word"), (b"\xff\xfe\x00", "cannot read")):
        path.write_bytes(content)
        with pytest.raises(KeywordFileError, match=told) as caught:
            KeywordList.read(path)
        assert str(path) in str(caught.value)
    with pytest.raises(KeywordFileError, match="cannot read"):
        KeywordList.read(tmp_path / "none")


@given(st.text(st.sampled_from("gore naked man裸体+c\u200b\u00adG\n"), max_size=30))
def test_the_gate_and_curation_agree(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "blocked.txt"
    path.write_text("\ufeff" + "\n".join(WORDS), "utf-8")
    flagged = asyncio.run(Keywords(str(path)).check(text)) is not None
    dropped = rules.apply(pa.array([text], pa.large_string()), Rules(keywords=str(path)))
    assert flagged == (dropped[0] == rules.reason_code("keyword"))


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "裸" * 100_000, "e" + "\u0301\u0323" * 100_000, "\u200b" * 100_000]
)
def test_huge_texts_take_time_that_grows_with_them(text: str) -> None:
    began = time.process_time()
    assert KeywordList(["a" * 50, "裸体", "gore"]).find(text + " go\u0301re") == "gore"
    assert time.process_time() - began < 8  # less than a second


def test_thousands_of_terms_are_looked_for_in_one_pass() -> None:
    words = KeywordList(
        [f"word{n} phrase{n}" for n in range(10_000)] + [f"裸{chr(0x4E00 + n)}" for n in range(5_000)]
    )
    text = "an ordinary text about word7 and 裸马 " * 1_000
    began = time.process_time()
    assert words.find(text.replace("裸", "课")) is None
    assert words.find(text + "word9999 \u200bphrase9999") is not None
    assert time.process_time() - began < 8  # about half a second
