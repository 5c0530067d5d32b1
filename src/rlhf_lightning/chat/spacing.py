"""What a format writes around a response: to be taken off what a policy said before another format writes it anew."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.chat.written import WrittenPrompt

_ASKED, _SAID = "\n\nHuman: hi\n\nAssistant:", "word"


class Spacing(NamedTuple):
    """Text around the responses of one format, special tokens left out.

    Attributes:
        before: stands before what was said, such as the space after `Assistant:`.
        after: stands between it and the end of the turn.
        always: dialogue or not, every prompt is written by the format.
    """

    before: str = ""
    after: str = ""
    always: bool = False

    @classmethod
    def of(cls, chat: ChatEncoder) -> Spacing:
        """The spacing of an encoder, found on an example.

        Args:
            chat: writes dialogues as the policy reads and continues them.
        """
        try:
            _, response = chat.encode_dialogue(_ASKED, _SAID)
        except RefusedTurnsError:  # a template with demands of its own; what it writes is left to the reward
            return cls()
        before, said, after = chat.decode([response])[0].partition(_SAID)
        return cls(before, after, chat.dialogue_format == "chat_template") if said else cls()

    def content(self, prompt: WrittenPrompt, text: str) -> str:
        """What was said, without the spacing.

        Args:
            prompt: what was answered; text that is no dialogue is continued as it stands.
            text: the response, special tokens left out; one that was cut may lack what stands after.
        """
        if prompt.continues and not self.always:
            return text
        return text.removeprefix(self.before).removesuffix(self.after)

    def so_far(self, prompt: WrittenPrompt, text: str) -> str:
        """What was said for certain, of a response that goes on: the beginning of what `content` will be.

        Args:
            prompt: what is answered.
            text: the response so far.
        """
        if prompt.continues and not self.always:
            return text
        if self.before.startswith(text):
            return ""
        said = text.removeprefix(self.before)
        held = next((n for n in range(len(self.after), 0, -1) if said.endswith(self.after[:n])), 0)
        return said[: len(said) - held]


NO_SPACING = Spacing()
