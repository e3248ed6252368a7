"""Operations and bytes of sparse full steps by sequence length: ``python -m benchmarks.sparse_cost``.

Counted, not timed: multiplications and additions of the blocks, and bytes that columns and remainders hold,
for the true sizes of FLUX.1 and Wan-14B in bf16. What each full step does and how many columns are kept is
asked of the code that does it. Prints a Markdown table and writes a CSV.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import command, tables
from hicache import HiCacheConfig
from hicache.companions.sparse import SparseAttention
from hicache.companions.sparse.layer import Phase, Turn
from hicache.schedule import full_steps
from hicache_kernels.sparse_attention import kept_columns

STEPS = 50
CONFIG = HiCacheConfig(interval=7, warmup=3)
SPARSE = SparseAttention()


@dataclass(frozen=True)
class Model:
    """What of a model's size counts.

    Args:
        layers: attentions of all tokens to all tokens.
        width: of a token, all heads together.
        heads: of an attention.
        weights: of a layer's projections that every token is multiplied with.
        prompt: text tokens that every token is attended to apart.
        calls: of the model in a step.
    """

    layers: int
    width: int
    heads: int
    weights: int
    prompt: int = 0
    calls: int = 1

    def dense(self, tokens: int) -> int:
        """Operations of one attention: scores, and the sum of values, 2 of each product."""
        return 4 * tokens**2 * self.width

    def others(self, tokens: int) -> int:
        """Operations of the rest of a layer."""
        return 2 * tokens * self.weights + 4 * tokens * self.prompt * self.width

    def attention(self, phase: Phase, tokens: int, kept: int, retaken: bool) -> int:
        """Operations of one attention at a full step that does this.

        Args:
            phase: what it does.
            tokens: of the sequence.
            kept: columns.
            retaken: not for the first time, so that constants are taken in the same step.
        """
        scores = self.dense(tokens) // 2 // SPARSE.sample
        few = 4 * tokens * kept * self.width
        return {
            Phase.DENSE: self.dense(tokens),
            Phase.CONSTANTS: self.dense(tokens) + scores,
            Phase.RETAKE: self.dense(tokens) + (2 if retaken else 1) * scores + few,
            Phase.SPARSE: few,
        }[phase]

    def full_step(self, ordinal: int, tokens: int, text: int) -> int:
        """Operations of all layers at the full step of an ordinal."""
        kept = kept_columns(tokens, text, SPARSE.keep)
        turn = Turn.at(ordinal, CONFIG.warmup, SPARSE.refresh)
        retaken = turn.taken >= CONFIG.warmup
        dense = SPARSE.dense_layers * self.dense(tokens)
        sparse = (self.layers - SPARSE.dense_layers) * self.attention(turn.phase, tokens, kept, retaken)
        return self.layers * self.others(tokens) + dense + sparse

    def held(self, tokens: int, text: int) -> int:
        """Bytes of remainders in bf16, and of columns, in all contexts."""
        groups, kept = -(-tokens // SPARSE.group), kept_columns(tokens, text, SPARSE.keep)
        layer = 2 * tokens * self.width + 4 * self.heads * groups * kept
        return self.calls * (self.layers - SPARSE.dense_layers) * layer


FLUX = Model(layers=57, width=3072, heads=24, weights=12 * 3072**2)
# self-attention, and of the attention to the prompt what every token is multiplied with; the MLP
WAN = Model(40, 5120, 40, 6 * 5120**2 + 2 * 5120 * 13824, prompt=512, calls=2)
# what is drawn → the model, all tokens, those of the text among them
DRAWN: dict[str, tuple[Model, int, int]] = {
    "FLUX.1, 1024²": (FLUX, 64**2 + 512, 512),
    "FLUX.1, 2048²": (FLUX, 128**2 + 512, 512),
    "Wan-14B, 480p × 81": (WAN, 21 * 30 * 52, 0),
    "Wan-14B, 720p × 81": (WAN, 21 * 45 * 80, 0),
}
HEADER = (
    "drawn",
    "tokens",
    "columns",
    "attention's share",
    "sparse step / dense",
    "retaking step / dense",
    "all full steps / dense",
    "bytes held",
)
Row = tuple[str, int, int, float, float, float, float, int]


def rows() -> list[Row]:
    """A row of :data:`HEADER` for each of :data:`DRAWN`; shares are of operations."""
    found: list[Row] = []
    for name, (model, tokens, text) in DRAWN.items():
        dense = model.layers * (model.dense(tokens) + model.others(tokens))
        last = CONFIG.warmup - 1
        each = [model.full_step(ordinal, tokens, text) for ordinal in range(len(full_steps(CONFIG, STEPS)))]
        found.append(
            (
                name,
                tokens,
                kept_columns(tokens, text, SPARSE.keep),
                model.layers * model.dense(tokens) / dense,
                model.full_step(last + 1, tokens, text) / dense,
                model.full_step(last + SPARSE.refresh, tokens, text) / dense,
                sum(each) / (dense * len(each)),
                model.held(tokens, text),
            )
        )
    return found


def cells(row: Row) -> tuple[str, ...]:
    """A row as the page has it."""
    name, tokens, columns, share, *ratios, held = row
    return (
        name,
        f"{tokens:,}",
        f"{columns:,}",
        f"{share:.0%}",
        *(f"{ratio:.2f}" for ratio in ratios),
        f"{held / 1e9:.1f} GB",
    )


def main() -> None:
    options = command.parser(__doc__).parse_args()
    found = rows()
    print(tables.markdown(HEADER, [cells(row) for row in found]))
    tables.save_csv(options.csv, HEADER, found)


if __name__ == "__main__":
    main()
