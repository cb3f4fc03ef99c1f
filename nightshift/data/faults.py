"""Reasons why a conversation cannot be encoded; apart from the code, so that reading them loads nothing."""

# Reason why a conversation cannot be encoded -> fix.
FAULTS = {
    "no_chat_template": "the base has no chat template; set base.chat_template, such as alpaca or chatml",
    "template_fails": "fix the turns to match the base's chat template",
    "template_drops_turn": "the base's chat template omits part of the conversation; set base.chat_template",
    "template_drops_tools": "the base's chat template renders no tools or calls; set base.chat_template",
    "template_drops_reasoning": "the base's chat template omits the reasoning of an answer; set "
    "base.chat_template",
    "template_changes_turns": "the base's chat template renders an answer that does not follow from its "
    "prompt; set base.chat_template",
    "no_supervised_token": "add text to the assistant turn",
}
