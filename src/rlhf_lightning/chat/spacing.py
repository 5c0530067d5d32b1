"""What a format writes around a response: to be taken off what a policy said before another format writes it anew."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_lightning.chat.encoder import ChatEncoder
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
        _, response = chat.encode_dialogue(_ASKED, _SAID)
        before, said, after = chat.decode([response])[0].partition(_SAID)
        return cls(before, after, chat.dialogue_format == "chat_template") if said else cls()

    def content(self, prompt: WrittenPrompt, text: str, ended: bool) -> str:
        """What was said, without the spacing.

        Args:
            prompt: what was answered; text that is no dialogue is continued as it stands.
            text: the response, special tokens left out.
            ended: whether it ended by itself.
        """
        if prompt.continues and not self.always:
            return text
        text = text.removeprefix(self.before)
        return text.removesuffix(self.after) if ended else text


NO_SPACING = Spacing()
