"""An agent that knows nothing of rft: it talks to any server of OpenAI's API, and prints its reward.

It asks the question of the row, and once more if the answer is wrong.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI

row = json.loads(Path(os.environ["RFT_ROW"]).read_text())
client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY name the session
messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
reward = 0.0
for attempt in range(2):
    try:
        reply = client.chat.completions.create(model="policy", messages=messages)
    except BadRequestError:  # the budget of the session is used up
        break
    message = reply.choices[0].message
    numbers = re.findall(r"-?\d+", message.content or "")
    if numbers and numbers[-1] == str(row["answer"]):
        reward = 1.0 - 0.25 * attempt
        break
    messages += [message, {"role": "user", "content": "That is wrong. Try again."}]
print(reward)
