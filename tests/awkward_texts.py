"""A page of text that tokenizers disagree about."""

from __future__ import annotations

AWKWARD: tuple[str, ...] = (
    # Spaces, tabs, lines.
    "", " ", "  ", "   ", "Hello world", " hello", "  two leading", "trailing  ", "tab\there\t\tand", "a     b      c",
    "\n", "\n\n\n", "a\n\n  b", "a\r\nb\r\n\r\nc", " \n \r\n  x", "a\u00a0b\u00a0\u00a0c", "\u3000全角\u3000",
    "\u2003em\u2009thin\u200bzero", "x\u0085y", "end ", "!\n\n!", "A   1  !  你",
    # Numbers.
    "12345", "1 22 333 4444 55555 666666", "a1b22c333", "3.14159, 1,000,000", "007", "1234567890123", "٣٤٥ ½ Ⅻ ²³ １２３４",
    # Apostrophes.
    "I'm you're he'll we've it's don't I'd", "I'M YOU'RE HE'LL IT'S", "rock 'n' roll '90s ''quoted''", "O’Neill’s",
    "'", "''s", " 's", "x 's", "tekken’s Été ÉTÉ",
    # Scripts and marks.
    "你好，世界。这是一个测试", "日本語のテキスト、カタカナ", "한국어 텍스트입니다", "中文mixed英文123", "ภาษาไทย", "ไทย123",
    "e\u0301 n\u0303 a\u0308\u0301 é ñ", "हिन्दी में", "العربية ١٢٣", "Ελληνικά Привет МИР", "ﬁ ﬀ ℌ",
    "CamelCaseWords HTTPServer iPhone ÀÉ École straßE ǅ", "O榿M+99⡣>?9YZꢿ㈣0R⸽0:꠶̿R ꄁﵲ9X",
    # Emoji.
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ☃️",
    # Code.
    "def f(x):\n    return x**2  # done\n\n\nclass A:\n\tpass\n", "if (a&&b||c) { x+=1; } // ok", "/path//x/ \n/",
    "a_b-c.d/e\\f|g~h^i`j$k%l<m>n=o+p", "http://x.y/z?q=1&r=2#f", "...!!!???", "$100 €50 £20 +1 =2 <3", "under_score __init__",
    "#hash @at", "\x01\x7f", "\ufeffbom", "IMGIMGABZ <sentinel:12>",
    # Special tokens of the vocabularies in gguf_writing.py.
    "<s>hi</s> there", "a<|user|>b c<|user|> d", "[INST] x[INST]y", "<unk>", "<0x0A>", "  <s>  x  ", "▁x ▁",
    "<|begin|>x<|end_of_text|>y", "aaaaaaaaaaa",
)  # fmt: skip
