"""Tiny seeded bases in transformers format: real architectures and tokenizers, random weights, a fraction of a second each.

The random weights are large, so that different inputs and different adapters give clearly different scores.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

TEXTS = Path(__file__).with_name("tiny_texts.txt")
"""Frozen: other words would make other tokenizers, hence other bases."""
VOCAB_SIZE = 1000
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def build_t5(folder: Path) -> Path:
    """Build an encoder-decoder of Flan-T5's kind (gated GELU, untied head) with a Unigram tokenizer."""
    return _build_t5(folder, T5Config, T5ForConditionalGeneration)


def build_mt5(folder: Path) -> Path:
    """Build the same under mT5's name."""
    return _build_t5(folder, MT5Config, MT5ForConditionalGeneration)


def _build_t5(folder: Path, config_class, model_class: type[PreTrainedModel]) -> Path:
    tokenizer = T5Tokenizer(vocab=_unigram_vocab(), extra_ids=0)
    config = config_class(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _save(folder, model_class, config, tokenizer)


def build_bart(folder: Path) -> Path:
    """Build an encoder-decoder with learned positions and a tied head, whose answers begin with <s> after </s>."""
    tokenizer = _byte_level(RobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=300, init_std=0.2,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return _save(folder, BartForConditionalGeneration, config, tokenizer)


def build_bert(folder: Path) -> Path:
    """Build an encoder with a pooler and a lower-casing WordPiece tokenizer."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(trained, trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False))
    pieces = [*special, *sorted(set(trained.get_vocab()) - set(special))]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id, **SIZES,
    )  # fmt: skip
    return _save(folder, BertModel, config, tokenizer)


def build_roberta(folder: Path) -> Path:
    """Build an encoder whose positions are counted from the padding token's id, with a byte-level tokenizer."""
    tokenizer = _byte_level(RobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=302, type_vocab_size=1, initializer_range=0.2,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, **SIZES,
    )  # fmt: skip
    return _save(folder, RobertaModel, config, tokenizer)


def build_llama(folder: Path) -> Path:
    """Build a decoder with grouped-query attention whose tokenizer, like Llama 2's, has no padding token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *bytes_]
    _train(trained, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False))
    vocab, merges = _bpe(trained)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **SIZES,
    )  # fmt: skip
    return _save(folder, LlamaForCausalLM, config, tokenizer)


def build_gpt2(folder: Path) -> Path:
    """Build a decoder with learned positions, a tied head and Conv1D layers, whose tokenizer has no padding token."""
    tokenizer = _byte_level(GPT2Tokenizer, ["<|endoftext|>"])
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=300, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def build_qwen2(folder: Path) -> Path:
    """Build a decoder with biases in its projections and a byte-level tokenizer."""
    tokenizer = _byte_level(Qwen2Tokenizer, ["<|endoftext|>"])
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **SIZES,
    )  # fmt: skip
    return _save(folder, Qwen2ForCausalLM, config, tokenizer)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "seq2seq": build_t5,
    "encoder": build_bert,
    "causal": build_llama,
    "qwen2": build_qwen2,
    "mt5": build_mt5,
    "bart": build_bart,
    "gpt2": build_gpt2,
    "roberta": build_roberta,
}


def _save(folder: Path, model_class: type[PreTrainedModel], config, tokenizer) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _texts() -> list[str]:
    return [string.printable, *TEXTS.read_text("utf-8").splitlines()]


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    tokenizer.train_from_iterator(_texts(), trainer)


def _byte_level(tokenizer_class, special: list[str]):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    _train(trained, trainer)
    vocab, merges = _bpe(trained)
    return tokenizer_class(vocab=vocab, merges=merges)


def _unigram_vocab() -> list[tuple[str, float]]:
    """Score the pieces of a trained BPE: few pieces first, frequent ones among equals.

    The Unigram trainer itself gives other scores at every run (its threads add floats in any order).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    _train(trained, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False))
    return [(piece, 0.0 if piece in special else -10 - index / 1000) for piece, index in _bpe(trained)[0].items()]


def _bpe(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return _by_id(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _by_id(vocab: dict[str, int]) -> dict[str, int]:
    return dict(sorted(vocab.items(), key=lambda entry: entry[1]))
