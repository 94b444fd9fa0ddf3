"""Whether a text is in the script of a language."""

import pytest

from vpo_ray.prompts.scripts import LANGUAGES, in_script_of

TEXTS = {
    "en": "A red ball rolls over the grass.",
    "vi": "Một quả bóng đỏ lăn trên cỏ.",
    "ru": "Красный мяч катится по траве.",
    "el": "Μια κόκκινη μπάλα κυλά στο γρασίδι.",
    "ar": "كرة حمراء تتدحرج على العشب.",
    "he": "כדור אדום מתגלגל על הדשא.",
    "hi": "एक लाल गेंद घास पर लुढ़कती है।",
    "bn": "একটি লাল বল ঘাসের উপর গড়িয়ে যায়।",
    "ta": "ஒரு சிவப்பு பந்து புல்லில் உருளுகிறது.",
    "te": "ఎర్ర బంతి గడ్డిపై దొర్లుతుంది.",
    "th": "ลูกบอลสีแดงกลิ้งบนหญ้า",
    "ka": "წითელი ბურთი ბალახზე გორავს.",
    "hy": "Կարմիր գնդակը գլորվում է խոտի վրայով։",
    "ko": "빨간 공이 잔디 위를 굴러간다.",
    "ja": "赤いボールが芝生の上を転がる。",
    "zh": "红色的球在草地上滚动。",
}
ONE_SCRIPT = {"en", "vi"}


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_in_its_own_language_and_in_no_other_script(language: str) -> None:
    for other, text in TEXTS.items():
        assert in_script_of(language, text) == (other == language or {other, language} == ONE_SCRIPT), other


def test_names_and_terms_in_other_letters_do_not_count_much() -> None:
    assert in_script_of("zh", "一只猫坐在 Tokyo 的屋顶上，4K HDR。")
    assert in_script_of("ja", "東京タワー、夜、雨の中。")
    assert in_script_of("en", "A kimono shop called 着物 in Kyoto.")
    assert in_script_of("en", "ＡＢＣ ｆｕｌｌ ｗｉｄｔｈ"), "in any form of the letters"
    assert not in_script_of("en", "一只猫坐在屋顶上 at night")
    assert not in_script_of("en", "ແມວນັ່ງເທິງຫຼັງຄາ"), "a script that no language here has"


def test_a_text_without_letters_is_in_no_other_language() -> None:
    for text in ("", "  ", "🎈 42 !"):
        assert all(in_script_of(language, text) for language in LANGUAGES)
