"""Writes tests/fixtures/tokenizer_ids.json: token ids as transformers and sentencepiece make them.

    python tests/references/tokenizer_ids.py SMOLLM2_FOLDER MINILM_FOLDER

Needs transformers and sentencepiece (extra `parity`), and the folders of the demo weights. The SentencePiece vocabulary
is trained here on this file's own texts; its pieces are stored as GGUF would store them.
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXTS = [
    "The capital of France is",
    "",
    " ",
    "   leading and  double  spaces   ",
    "tabs\tand\nlines\r\n\n\nmany",
    "I'm, you've, he'll, they'D, WE'RE; don't",
    "In 1984, 3.14159 and 1,000,000; 0x1F 2^10 a1b2",
    "naïve café Ångström façade Übergröße",
    "Съешь же ещё этих мягких французских булок",
    "Η ταχύτατη αλεπού 12 φορές",
    "東京は日本の首都です。你好，世界！",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 thumb, ☕️",
    "e\u0301 combining, \u00e9 composed, \u200b zero width, \ufeff mark",
    "½ ⅓ ² Ⅷ fractions and numerals",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # done",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "a" * 60 + " " + "ha" * 40,
    "\x00\x01 control \x7f characters",
    "https://example.org/?q=1&r=%20 mail@example.org #tag @name",
]


def train_pieces() -> tuple[sentencepiece.SentencePieceProcessor, dict[str, list[object]]]:
    """A small BPE vocabulary with byte fallback, and its fields as GGUF stores them."""
    corpus, model = Path(__file__).read_text(encoding="utf-8").splitlines(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus, *TEXTS] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    return pieces, {
        "tokens": [pieces.id_to_piece(i) for i in ids],
        "scores": [pieces.get_score(i) for i in ids],
        "token_type": kinds,
    }


def main(smollm2: Path, minilm: Path, output: Path) -> None:
    """Write the fixture."""
    gguf = AutoTokenizer.from_pretrained(smollm2, gguf_file=next(smollm2.glob("*.gguf")).name)
    # transformers passes over tokenizer.ggml.pre: this is the splitter of SmolLM2's tokenizer.json, as in llama.cpp.
    # Without it only numerals beyond ASCII come out differently.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gguf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bert = AutoTokenizer.from_pretrained(minilm)
    pieces, fields = train_pieces()
    plain = [text for text in TEXTS if "<|" not in text and "\x00" not in text]
    fixture = {
        "texts": TEXTS,
        "smollm2": [gguf(text, add_special_tokens=False).input_ids for text in TEXTS],
        "minilm": [bert(text).input_ids for text in TEXTS],
        "sentencepiece": {"fields": fields, "texts": plain, "ids": [pieces.encode(text) for text in plain]},
    }
    output.write_text(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parents[1] / "fixtures" / "tokenizer_ids.json")
