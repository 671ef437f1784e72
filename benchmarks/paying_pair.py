"""What routing would give where the large model costs many times the small one: 0.5B and 7B in 4 bits.

No weights of such a pair come with the project, so two GGUF files of random 4-bit blocks with the shapes of
Qwen2.5 0.5B and 7B are written to a temporary folder (about 5 GB, removed afterwards) and their calls are
measured in llama.cpp. Traces of R-Stitch and R2R are recorded with the real pair of the catalogue, at several
thresholds; the cost model then says what texts with these hand-overs would take. Its figures are predictions
of the cost model, and are called so: nothing here says whether the answers of such a pair would be right.

    viaticum models pull && pip install xllamacpp
    python benchmarks/paying_pair.py QUESTIONS.jsonl [--json] [--traces FILE] [--small FILE --large FILE]

`--traces` keeps the recorded traces, and reads them where the file is there. `--small` and `--large` measure
GGUF files at hand in place of random ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, load_runner
from viaticum.decoders.cost import Calls, CostModel, measure_pair
from viaticum.decoders.decoding_mode import DRAFTS, LARGE_ALONE, DecodingMode, HandoffStats
from viaticum.models.token_routers import token_router
from viaticum.questions import read_questions
from viaticum.strategies import get as get_strategy
from viaticum.weights import locate

TAUS = (0.005, 0.02, 0.05, 0.1, 0.2)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
ACCEPTANCE = 0.7  # of drafts, for the speculative mode beside them: a larger pair's is not known here
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: weights of a block, and its bytes: a float16 scale, then 4 bits each
SCALE = np.float16(0.004)


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model. tied: the output weights are the embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool

    def tensors(self) -> Iterator[tuple[str, int, int]]:
        """Names, rows and columns of the matrices."""
        head = self.hidden // self.heads
        yield "token_embd.weight", self.vocabulary, self.hidden
        if not self.tied:
            yield "output.weight", self.vocabulary, self.hidden
        for layer in range(self.layers):
            for name, rows, columns in (
                ("attn_q", self.hidden, self.hidden),
                ("attn_k", self.kv_heads * head, self.hidden),
                ("attn_v", self.kv_heads * head, self.hidden),
                ("attn_output", self.hidden, self.hidden),
                ("ffn_gate", self.inner, self.hidden),
                ("ffn_up", self.inner, self.hidden),
                ("ffn_down", self.hidden, self.inner),
            ):
                yield f"blk.{layer}.{name}.weight", rows, columns


SHAPES = {
    "small": Shape(896, 24, 14, 2, 4864, 151_936, tied=True),
    "large": Shape(3584, 28, 28, 4, 18_944, 152_064, tied=False),
}


def write_random_model(shape: Shape, file: Path) -> None:
    """A GGUF file of random Q4_0 blocks. Every matrix repeats one buffer, so that little memory is needed."""
    most = max(rows * columns for _, rows, columns in shape.tensors()) // BLOCK
    blocks = np.random.default_rng(0).integers(0, 256, (most, BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{token}>" for token in range(shape.vocabulary)])
    writer.add_token_types([1] * shape.vocabulary)
    writer.add_token_merges(["< 1"])
    writer.add_eos_token_id(0)
    for name, rows, columns in shape.tensors():
        matrix = blocks[: rows * columns // BLOCK].reshape(rows, columns // BLOCK * BLOCK_BYTES)
        writer.add_tensor(name, matrix, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    kv = shape.hidden // shape.heads * shape.kv_heads
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(shape.hidden, np.float32))
        for name, size in (("attn_q", shape.hidden), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measured_costs(arguments: argparse.Namespace) -> CostModel:
    """Call times of the two files, or of random ones."""
    folder = Path(tempfile.mkdtemp(prefix="paying-pair-", dir=arguments.folder))
    try:
        files = {}
        for name, shape in SHAPES.items():
            files[name] = getattr(arguments, name)
            if files[name] is None:
                files[name] = folder / f"{name}.gguf"
                sys.stderr.write(f"writing {files[name]}\n")
                write_random_model(shape, files[name])
        small, large = (
            load_runner(files[name], engine="llama", slots=arguments.slots, context=1024)
            for name in ("small", "large")
        )
        sys.stderr.write("timing calls\n")
        return measure_pair(small, large, context=arguments.context, repeats=arguments.repeats)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Recorded:
    """Texts of one router setting. made_by, dropped: of each text, by position; prompts: their lengths."""

    router: str
    setting: float
    made_by: list[list[int]]
    dropped: list[list[bool]]
    prompts: list[int]

    @property
    def share(self) -> float:
        """Of tokens that the large model made."""
        return statistics.mean(maker for text in self.made_by for maker in text)

    @property
    def rates(self) -> HandoffStats:
        drops = sum(map(sum, self.dropped))
        large = sum(map(sum, self.made_by))
        small = sum(map(len, self.made_by)) - large
        return HandoffStats(drops / max(1, small + drops), min(1.0, drops / max(1, large)), ACCEPTANCE)


def record(arguments: argparse.Namespace) -> list[Recorded]:
    """Decode questions with the real pair, at every setting of both routers."""
    catalogue = Catalogue.load()
    pair = catalogue["r2r"]
    folders = [locate(catalogue[name]) for name in pair.members]
    tokenizer = AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
    small, large = (load_runner(folder, slots=arguments.questions, context=1536) for folder in folders)
    cot = get_strategy("cot")
    prompts = [
        tokenizer.apply_chat_template(cot.messages(each.query), add_generation_prompt=True, return_dict=False)
        for each in read_questions(arguments.file, limit=arguments.questions)
    ]
    found = []
    stitch = {"router": "r-stitch", "share": None, "threshold": None, "router_path": None, "drift": None}
    settings = [("r-stitch", tau, stitch | {"tau": tau}) for tau in TAUS]
    settings += [("r2r", share, {"share": share, "threshold": None}) for share in SHARES]
    for router, setting, changes in settings:
        sys.stderr.write(f"recording {router} {setting}\n")
        decoder = MixedDecoder(
            large,
            small,
            tokenizer=tokenizer,
            router=token_router(pair.model_copy(update=changes), catalogue, small),
        )
        results = decoder.generate_all(
            [Request(prompt, max_new_tokens=arguments.tokens) for prompt in prompts]
        )
        found.append(
            Recorded(
                router,
                setting,
                [list(each.trace.made_by) for each in results],
                [dropped_of(each.trace.made_by, each.trace.entropies, setting, router) for each in results],
                list(map(len, prompts)),
            )
        )
    return found


def dropped_of(made_by: tuple[int, ...], entropies: tuple[float, ...], tau: float, router: str) -> list[bool]:
    """Where a token of the small model was dropped: R2R, at every token of the large one; R-Stitch, where a
    run begins, also one right behind another that had handed back (equation 2 of arXiv 2507.17307)."""
    dropped = []
    for position, maker in enumerate(made_by):
        handed_back = position == 0 or not made_by[position - 1] or entropies[position - 1] <= tau
        dropped.append(bool(maker) and (router == "r2r" or handed_back))
    return dropped


def predictions(costs: CostModel, recorded: list[Recorded], slots: int) -> dict[str, Any]:
    """Speed-ups over the large model alone by the cost model, of every recorded setting."""
    counts = [streams for streams in (1, 4) if streams <= slots]
    rows = []
    for each in recorded:
        texts = list(zip(each.made_by, each.dropped, each.prompts, strict=True))
        row: dict[str, Any] = {"router": each.router, "setting": each.setting, "share": each.share}
        for streams in counts:
            routed = sum(
                costs.latency(Calls.from_trace(text, dropped, prompt, prompt - 1), streams)
                for text, dropped, prompt in texts
            )
            alone = sum(
                costs.latency(
                    Calls.from_trace([1] * len(text), [False] * len(text), prompt, prompt - 1), streams
                )
                for text, _, prompt in texts
            )
            row[f"speedup_{streams}"] = alone / routed
            drafts = [DecodingMode(True, draft) for draft in DRAFTS[:3]] if each.router == "r-stitch" else []
            large = costs.predict(LARGE_ALONE, each.rates, streams)
            row[f"with_drafts_{streams}"] = max(
                (costs.predict(mode, each.rates, streams) / large for mode in drafts), default=None
            )
        rows.append(row)
    speculative = {
        streams: max(
            costs.predict(DecodingMode(False, draft), HandoffStats(0, 0, ACCEPTANCE), streams)
            for draft in DRAFTS
        )
        / costs.predict(LARGE_ALONE, HandoffStats(0, 0, ACCEPTANCE), streams)
        for streams in counts
    }
    return {
        "cost_model_settings": rows,
        "cost_model_at_shares": {
            router: {share: at_share(rows, router, share) for share in SHARES}
            for router in ("r-stitch", "r2r")
        },
        f"cost_model_speculative_at_acceptance_{ACCEPTANCE}": speculative,
    }


def at_share(rows: list[dict[str, Any]], router: str, share: float) -> float | None:
    """The speed-up of one text at a share, interpolated between settings; None outside of them."""
    points = sorted((row["share"], row["speedup_1"]) for row in rows if row["router"] == router)
    if not points or not points[0][0] <= share <= points[-1][0]:
        return None
    return float(np.interp(share, *map(list, zip(*points, strict=True))))


def traces(arguments: argparse.Namespace) -> list[Recorded]:
    if arguments.traces is not None and arguments.traces.exists():
        return [Recorded(**json.loads(line)) for line in arguments.traces.read_text().splitlines()]
    found = record(arguments)
    if arguments.traces is not None:
        arguments.traces.write_text("".join(json.dumps(asdict(each)) + "\n" for each in found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSONL with question and answer, for the traces")
    parser.add_argument("--traces", type=Path, help="JSONL file to keep the traces in, or to read them from")
    parser.add_argument("--small", type=Path, help="GGUF file in place of random weights")
    parser.add_argument("--large", type=Path, help="GGUF file in place of random weights")
    parser.add_argument("--folder", type=Path, help="for the random weights; about 5 GB")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="of each recorded text (default 96)")
    parser.add_argument("--slots", type=int, default=4, help="rows to measure up to (default 4)")
    parser.add_argument("--context", type=int, default=256, help="cached positions (default 256)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    recorded = traces(arguments)
    costs = measured_costs(arguments)
    found = {
        "weights": "random" if arguments.large is None else str(arguments.large),
        "measured_seconds": {
            name: {"rows": each.rows, "tokens": each.tokens, "seconds": each.seconds}
            for name, each in (("small", costs.small), ("large", costs.large))
        },
        "measured_large_over_small": costs.large(1, 1) / costs.small(1, 1),
        **predictions(costs, recorded, arguments.slots),
        "conditions": costs.conditions,
    }
    if arguments.json:
        print(json.dumps(found))
        return
    table = Table("router", "setting", "share", "x at 1", "x at 4", "with drafts at 1", box=None)
    for row in found["cost_model_settings"]:
        names = ("setting", "share", "speedup_1", "speedup_4", "with_drafts_1")
        cells = ("" if row.get(name) is None else f"{row[name]:.3g}" for name in names)
        table.add_row(row["router"], *cells)
    Console(width=110).print(table)
    print(f"measured: a token of the large model costs {found['measured_large_over_small']:.1f} of the small")
    print("all else is what the cost model predicts, as multiples of the large model alone")
    print(json.dumps(found["cost_model_at_shares"]))


if __name__ == "__main__":
    main()
