"""Text: classification, language models, tagging."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Module, classes, everything, reals, seeded, targets

V, K, D, T = 12, 3, 8, 5
PAD = 0


class GRUClassifier(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.gru = nn.GRU(D, D, batch_first=True)
        self.fc = nn.Linear(D, K)
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        _, hidden = self.gru(self.embedding(tokens))
        return self.fc(hidden[-1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        text, label = batch
        return self.loss_fn(self(text), label)


class MaskedTransformer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=PAD)
        layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.classifier = nn.Linear(D, K)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(hidden.dtype)
        return self.classifier(self.pooler((hidden * kept).sum(dim=1) / kept.sum(dim=1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["tokens"]), batch["label"])


class BagOfWords(Module):
    """Flat tokens and offsets, the label first, as in the tutorial on AG_NEWS."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(V, D)
        self.fc = nn.Linear(D, K)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        label, text, offsets = batch
        predicted = self.fc(torch.relu(self.embedding(text, offsets)))
        self.log("acc", (predicted.argmax(1) == label).sum().item() / label.size(0))
        return self.criterion(predicted, label)


@dataclasses.dataclass
class SequenceClassifierOutput:
    loss: Tensor | None = None
    logits: Tensor | None = None


class ForSequenceClassification(nn.Module):
    """The interface of Hugging Face models: labels go in, the loss comes out."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.embeddings = nn.Embedding(V, D)
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.GELU())
        self.pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.classifier = nn.Linear(D, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        hidden = self.encoder(self.embeddings(input_ids))
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier(self.pooler((hidden * mask).sum(1) / mask.sum(1)))
        loss = None
        if labels is not None:
            loss = nn.CrossEntropyLoss()(logits.view(-1, self.num_labels), labels.view(-1))
        return SequenceClassifierOutput(loss=loss, logits=logits)


class HuggingFaceStyle(Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = self.build()

    def build(self) -> nn.Module:
        return ForSequenceClassification(num_labels=K)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self(**batch)
        loss = outputs.loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-5)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


class Bert(HuggingFaceStyle):
    def build(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=D,
            max_position_embeddings=T,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=K,
        )
        return BertForSequenceClassification(config)


class CausalLM(Module):
    """Labels beside the tokens, shifted in the step, -100 where nothing is to be learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, D)
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.rnn(self.wte(input_ids))[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, labels = self(batch["input_ids"]), batch["labels"]
        shift_logits = logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        loss = F.cross_entropy(shift_logits.view(-1, V), shift_labels.view(-1), ignore_index=-100)
        self.log("perplexity", torch.exp(loss.detach()))
        return loss


class TinyGPT(nn.Module):
    """The interface of nanoGPT: (indices, targets) go in, (logits, loss) come out."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.drop = nn.Dropout(0.0)
        self.block = nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True, norm_first=True)
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device)))
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], dtype=x.dtype)
        logits = self.lm_head(self.block(x, src_mask=mask, is_causal=True))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class NanoGPT(Module):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        idx, targets = batch
        _, loss = self.gpt(idx, targets)
        return loss


class NextToken(CausalLM):
    """Inputs and targets are cut from one tensor of tokens."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch[:, :-1], batch[:, 1:]
        logits = self(x)
        return F.cross_entropy(logits.reshape(-1, V), y.reshape(-1))


class Tagger(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.lstm = nn.LSTM(D, 4, bidirectional=True, batch_first=True)
        self.hidden2tag = nn.Linear(8, K)
        self.loss = nn.CrossEntropyLoss(ignore_index=PAD)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hidden2tag(self.lstm(self.embedding(tokens))[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, tags = batch
        scores = self(tokens).view(-1, K)
        return self.loss(scores, tags.view(-1))


class MaskedTagger(Tagger):
    """An average over the labelled tokens, written out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, tags = batch
        losses = F.cross_entropy(self(tokens).transpose(1, 2), tags, reduction="none")
        mask = (tags != PAD).to(losses.dtype)
        return (losses * mask).sum() / mask.sum().clamp(min=1)


class TeacherForcing(Module):
    """A translator: the decoder reads the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(V, D), nn.Embedding(V, D)
        self.encoder, self.decoder = nn.GRU(D, D, batch_first=True), nn.GRU(D, D, batch_first=True)
        self.out = nn.Linear(D, V)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        src, tgt = batch
        _, state = self.encoder(self.source(src))
        decoded, _ = self.decoder(self.target(tgt[:, :-1]), state)
        return F.cross_entropy(self.out(decoded).flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD)


def _padded() -> Tensor:
    tokens = classes(V, T, start=1, seed=5)
    return tokens.masked_fill(torch.arange(T) >= torch.tensor([5, 3, 4, 2, 5, 4])[:, None], PAD)


def _bag() -> Any:
    text = classes(V, 3, seed=5).flatten()
    return classes(K), text, torch.tensor([0, 2, 6, 9, 10, 15])


def _encoded() -> Any:
    tokens = _padded()
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": classes(K)}


def _labelled() -> Any:
    tokens = classes(V, T, seed=5)
    return {"input_ids": tokens, "labels": torch.where(reals(T) > -0.5, tokens, -100)}


def _entry(
    name: str, style: str, module: Any, layers: tuple[str, ...], batch: Any, of: Any, domain: str = "text", **more: Any
) -> Entry:
    return Entry(name, domain, style, seeded(module), batch, of, layers, **more)


ENTRIES = [
    _entry(
        "GRUClassifier",
        "CrossEntropyLoss after an embedding and a GRU",
        GRUClassifier,
        ("embedding",),
        lambda: (classes(V, T, seed=5), classes(K)),
        targets(1),
    ),
    _entry(
        "MaskedTransformer",
        "F.cross_entropy; padding mask from the tokens, used before the mix",
        MaskedTransformer,
        ("pooler",),
        lambda: {"tokens": _padded(), "label": classes(K)},
        targets("label"),
    ),
    _entry(
        "MaskedTransformer, mixed early",
        "F.cross_entropy; padding mask from the tokens, used after the mix",
        MaskedTransformer,
        ("embed",),
        lambda: {"tokens": _padded(), "label": classes(K)},
        targets("label"),
        options={"union_masks": False},
    ),
    _entry("BagOfWords", "CrossEntropyLoss; EmbeddingBag on flat tokens", BagOfWords, ("embedding",), _bag, targets(0)),
    _entry(
        "HuggingFaceStyle",
        "inside the network's forward, outputs.loss",
        HuggingFaceStyle,
        ("model.pooler",),
        _encoded,
        targets("labels"),
    ),
    _entry(
        "Bert",
        "BertForSequenceClassification of transformers, outputs.loss",
        Bert,
        ("model.bert.pooler",),
        _encoded,
        targets("labels"),
        needs="transformers",
    ),
    _entry(
        "CausalLM",
        "F.cross_entropy on shifted labels with ignore_index",
        CausalLM,
        ("wte",),
        _labelled,
        targets("labels"),
        "language models",
    ),
    _entry(
        "NanoGPT",
        "inside the network's forward, a tuple (logits, loss)",
        NanoGPT,
        ("gpt.drop",),
        lambda: (classes(V, T, seed=5), classes(V, T, seed=6)),
        targets(1),
        "language models",
    ),
    _entry(
        "NextToken",
        "F.cross_entropy on tokens that are inputs too",
        NextToken,
        ("wte",),
        lambda: classes(V, T, seed=5),
        everything,
        "language models",
        moves_inputs=True,
    ),
    _entry(
        "Tagger",
        "CrossEntropyLoss on flattened tags with ignore_index",
        Tagger,
        ("embedding",),
        lambda: (classes(V, T, seed=5), classes(K, T)),
        targets(1),
        "tagging",
    ),
    _entry(
        "MaskedTagger",
        "F.cross_entropy without reduction, averaged over labelled tokens",
        MaskedTagger,
        ("embedding",),
        lambda: (classes(V, T, seed=5), classes(K, T)),
        targets(1),
        "tagging",
    ),
    _entry(
        "TeacherForcing",
        "F.cross_entropy; the decoder reads the targets",
        TeacherForcing,
        ("source",),
        lambda: (classes(V, T, seed=5), classes(V, T, seed=6)),
        targets(1),
        "translation",
        refused="a path from the batch to 'decoder' .* leads around it",
        options={"strict": True},
    ),
]
