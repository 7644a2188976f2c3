"""What recipes may say of samples of the built-in task, checked without importing torch."""

from dataclasses import dataclass

from cdistill.builtin.questions import COMPOSITIONAL, DIRECT
from cdistill.choices import MOST_TURNS, require_count
from cdistill.errors import InputError

SUBTYPES = (*DIRECT, *COMPOSITIONAL)
CAPTION, MIXED = "caption", "mixed"  # kinds of samples without questions, and with questions of several kinds
MODALITIES = ("image", "text")
PAIRS = ("all", "seen", "unseen")


@dataclass(frozen=True)
class BuiltinTask:
    """What a sample of the built-in task is made of.

    Attributes:
        modality: ``image`` shows the scene as pixels, ``text`` writes it out before the first question.
        caption: share of samples whose first turn asks for a caption.
        sentences: sentences of a caption beyond the list of objects.
        turns: questions per sample.
        subtypes: kinds of questions, drawn uniformly.
        one_kind: the questions of a sample are all of one kind.
        pairs: of colour and shape. ``seen``: none of `scenes.UNSEEN` is in a scene, a question or an answer; ``unseen``: every
            scene has one of them, and questions name one, but those that count; of two captions either one does.
        text: of image samples, the share whose scene is written out instead, with questions of every kind.
    """

    modality: str = "image"
    caption: float = 0.0
    sentences: int = 6
    turns: int = 6
    subtypes: tuple[str, ...] = SUBTYPES
    one_kind: bool = False
    text: float = 0.0
    pairs: str = "all"

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise InputError(f"modality must be {' or '.join(MODALITIES)}, got {self.modality!r}")
        if self.pairs not in PAIRS:
            raise InputError(f"pairs must be one of {', '.join(PAIRS)}, got {self.pairs!r}")
        if not 0.0 <= self.caption <= 1.0:
            raise InputError(f"caption must lie between 0 and 1, got {self.caption}")
        if not 0.0 <= self.text < 1.0:
            raise InputError(f"text must be at least 0 and below 1, got {self.text}")
        if self.text and (self.modality == "text" or not self.turns):
            raise InputError(
                "text must be 0 with modality text or without turns: it is the share of written scenes with questions"
            )
        require_count("sentences", self.sentences, MOST_TURNS, least=0)
        require_count("turns", self.turns, MOST_TURNS, least=0)
        if self.turns == 0 and self.caption < 1.0:
            raise InputError(f"turns must be at least 1 (0 where every sample has a caption), got {self.turns}")
        unknown = set(self.subtypes) - set(SUBTYPES)
        if unknown or not self.subtypes:
            raise InputError(
                f"subtypes must be some of {', '.join(SUBTYPES)}, got {', '.join(sorted(unknown)) or 'none'}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a sample may be of: a sub-type, or all of `CAPTION` without questions, of `MIXED` with those of several."""
        if not self.turns:
            return (CAPTION,)
        asked = tuple(dict.fromkeys((*self.subtypes, *(SUBTYPES if self.text else ()))))
        return asked if self.turns == 1 or self.one_kind or len(asked) == 1 else (MIXED,)
