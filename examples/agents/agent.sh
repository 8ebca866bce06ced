#!/usr/bin/env bash
# An agent as a shell script: one question by curl. Its reward goes to /rl/set_reward. Needs curl and jq.
set -euo pipefail
post() { curl -sS --fail-with-body "$OPENAI_BASE_URL/$1" -H "Authorization: Bearer $OPENAI_API_KEY" --json @-; }

answer=$(jq '{model: "policy", messages: [{role: "user", content: .prompt}]}' "$RFT_ROW" |
	post chat/completions | jq -r '.choices[0].message.content')
right=$(jq -r '.answer' "$RFT_ROW")
last=$(grep -oE -- '-?[0-9]+' <<<"$answer" | tail -n 1 || true)
if [ "$last" = "$right" ]; then reward=1; else reward=0; fi
echo "{\"reward\": $reward}" | post rl/set_reward
