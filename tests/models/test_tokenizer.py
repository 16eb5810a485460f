"""Our own tokenizer: whole characters, whatever the script."""

from vlfoundry.models.tokenizer import SPECIAL_TOKENS, train, wide_characters

TEXTS = [
    "red apple", "white heart suit", "赤い林檎", "白いハート", "红苹果", "白心",
    "تفاحة حمراء", "قلب أبيض", "mela rossa", "seme di cuori bianco", "Å\N{COMBINING RING ABOVE} 🙂",
]  # fmt: skip
CHARACTERS = {c for text in TEXTS for c in text if not c.isascii()}


def halves(tokenizer, text: str) -> int:
    """Tokens of a text that are no whole characters."""
    return sum("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i]) for i in tokenizer.encode(text))


def test_no_token_of_a_text_is_half_a_character() -> None:
    size = len(SPECIAL_TOKENS) + 256 + 2 * len(CHARACTERS)
    assert set(wide_characters(TEXTS, size)) == CHARACTERS
    assert sum(halves(train(TEXTS, size), text) for text in TEXTS) > 0
    tokenizer = train(TEXTS, size, whole=sorted(CHARACTERS))
    for text in TEXTS:
        assert halves(tokenizer, text) == 0
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(tokenizer.encode(c)) == 1 for c in CHARACTERS)
    numbered = train(TEXTS, size, whole=["125", "1000"])
    assert len(numbered.encode("[125,1000,0,125]")) == 9
    assert halves(tokenizer, "柿") > 0  # which it has not met: bytes, and nothing is lost
    assert tokenizer.decode(tokenizer.encode("柿")) == "柿"


def test_the_most_frequent_characters_come_first() -> None:
    assert wide_characters(["\u4e2d\u6587 abc", "\u4e2d\u56fd", "\u6587\u4e2d"], 2) == [
        "\u4e2d",
        "\u6587",
    ]
