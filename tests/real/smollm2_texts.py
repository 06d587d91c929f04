"""Texts for the checks of SmolLM2: awkward ones for its tokenizer, questions, and a passage in the public domain."""

AWKWARD = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t x", " leading", "trailing ", "a  b   c    d", "line\r\nline\rline\n",
    "Hello, world!", "HELLO hello HeLLo", "don't can't we'll I'M they've you're it'd", "DON'T 'tis ''quoted''",
    "0", "12345678901234567890", "3.14159, -2.5e-10, 1,000,000", "x1y22z333", "١٢٣ ४५६ 七八九", "½ ² ③ Ⅷ",
    "def f(x):\n    return x**2  # square\n", "<html><body class=\"a\">&amp;</body></html>", "{\"a\": [1, 2, null]}",
    "a/b\\c:d;e|f", "!!!???...", "———–-−", "«guillemets» “curly” ‘quotes’", "$100 €50 £20 ¥10 ₹5", "100% of @user #tag",
    "naïve café résumé Zoë", "Straße ÄÖÜ äöü", "Łódź Příliš žluťoučký kůň", "Ελληνικά γράμματα", "Привет, мир!",
    "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！", "こんにちは世界", "안녕하세요 세계",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷", "e\u0301 vs é", "zero\u200bwidth \ufeff bom", "nbsp\u00a0thin\u2009wide\u3000",
    "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "<repo_name>x<file_sep>", "\x00\x01\x1f\x7f", "a" * 300,
]  # fmt: skip

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]
CONVERSATION = ["Hi! My name is Ada.", "Which animal says moo?", "What is my name?"]
PROMPT = "The most important thing about the sun is that"

_LINES = """
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and what is the
use of a book,” thought Alice “without pictures or conversations?”

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say
to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over afterwards, it occurred to her that she ought
to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a watch out
of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet.
"""
#: Lewis Carroll, Alice's Adventures in Wonderland (1865), the beginning.
PASSAGE = "\n\n".join(" ".join(paragraph.split()) for paragraph in _LINES.split("\n\n"))

#: Beginnings that are continued by 128 tokens, greedily and with beams.
BEGINNINGS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three states of matter are",
    "Dear Sir or Madam,",
    "In the year 1969,",
    "The recipe begins with two cups of flour,",
    "A triangle has three sides, and a square",
    "My favourite season is autumn because",
    "The quick brown fox",
    "To install the program, first",
    "Photosynthesis is the process by which",
    "She opened the old wooden box and found",
    "The main difference between cats and dogs is",
    "1, 2, 3, 4, 5, 6,",
    "The Roman Empire fell because",
    "Breaking news: scientists have discovered",
    "If x + 3 = 10, then x =",
    "The moon goes around the earth",
]
