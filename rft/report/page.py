"""The report's page: a self-contained Jinja template, without external fonts, scripts or images."""

STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #e3e8ef; --card: #fff; --ground: #f5f7fa;
        --blue: #2f6bd8; --bad: #d1495b; --warn: #b7650a; --good: #14805f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 72px; }
header { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; margin-bottom: 22px; }
h1 { font-size: 28px; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 44px 0 14px; }
h3 { font-size: 14px; margin: 0; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.push { margin-left: auto; }
.pill { font-size: 13px; padding: 2px 11px; border-radius: 99px; background: #e6eefc; color: var(--blue); }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.fact { padding: 13px 15px; }
.fact b { display: block; font-size: 21px; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
          white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 14px 8px; display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; margin-top: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif !important; }
figcaption p { margin: 0 0 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { text-align: left; padding: 6px 14px; border-top: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; border-top: 0; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--soft); }
td.text { overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.bad { color: var(--bad); } .warn { color: var(--warn); } .info { color: var(--soft); }
.scroll { max-height: 340px; overflow: auto; }
.pair { margin-bottom: 14px; overflow: hidden; }
.pair > .prompt { padding: 12px 16px; background: #fafbfd; border-bottom: 1px solid var(--line); }
.sides { display: grid; grid-template-columns: 1fr 1fr; }
.side { padding: 12px 16px 14px; min-width: 0; }
.side + .side { border-left: 1px solid var(--line); }
.tag { font-size: 12px; color: var(--soft); margin-bottom: 6px; display: flex; gap: 10px; flex-wrap: wrap; }
.tag .correct { color: var(--good); } .tag .wrong, .tag .error { color: var(--bad); }
.turns { list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column; gap: 6px; }
.turns li { border-left: 3px solid var(--line); padding: 3px 0 3px 10px; }
.turns li.sampled { border-left-color: var(--blue); background: #f3f7fe; }
.turns .tag { margin-bottom: 1px; } .turns .tag b { color: var(--ink); font-weight: 600; }
.turns li.sampled .tag b { color: var(--blue); }
.call { color: var(--good); }
details.tokens { padding: 10px 0 0; font-size: 13px; color: var(--soft); }
.tokens pre { color: var(--soft); } .tokens span.sampled { background: #dce8fd; color: var(--ink); }
.tokens i { display: block; color: var(--warn); }
details { padding: 12px 16px; } summary { cursor: pointer; } details pre { margin-top: 12px; }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr; } .facts { grid-template-columns: 1fr 1fr; }
  .side + .side { border-left: 0; border-top: 1px solid var(--line); } }
@media print { body { background: #fff; }
  .scroll { max-height: none; } figure, .pair { break-inside: avoid; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · rft report</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<header>
  <h1>{{ name }}</h1>
  <span class="soft">{{ algorithm }}</span>
  <span class="pill">{{ state }}</span>
  <span class="soft small push">report of {{ written }}</span>
</header>

<section class="facts">
{% for fact in facts %}
  <div class="card fact"><span class="soft small">{{ fact.label }}</span><b>{{ fact.value }}</b>
    <span class="soft small">{{ fact.remark }}</span></div>
{% endfor %}
</section>

<h2>Course of the run</h2>
{% if charts %}
<section class="charts">
{% for chart in charts %}
  <figure class="card"><figcaption><h3>{{ chart.title }}</h3><p class="soft small">{{ chart.caption }}</p>
    </figcaption>{{ chart.svg | safe }}</figure>
{% endfor %}
</section>
<p class="soft small">Over optimizer steps. Dashed lines: resumes; dotted red lines: faults.</p>
{% else %}
<p class="soft">No step has been written yet.</p>
{% endif %}

<h2>Time line</h2>
{% if timeline %}
<figure class="card">{{ timeline | safe }}</figure>
{% endif %}
{% if events %}
<div class="card scroll" style="margin-top: 14px">
<table>
  <tr><th>after</th><th>step</th><th>what</th><th></th></tr>
{% for event in events %}
  <tr><td class="number">{{ event.at }}</td><td class="number">{{ event.step }}</td>
    <td class="{{ event.tone }}"><code>{{ event.kind }}</code></td><td class="text">{{ event.text }}</td></tr>
{% endfor %}
</table>
</div>
{% else %}
<p class="soft">No events.</p>
{% endif %}

{% macro conversation(session) %}
  <ol class="turns">
  {% for part in session.parts %}
    <li class="{{ "sampled" if part.sampled else "given" }}">
      <div class="tag"><b>{{ "policy" if part.sampled else part.role }}</b>
      {% for fact in part.facts %}<span>{{ fact }}</span>{% endfor %}</div>
      {% if part.text %}<pre>{{ part.text }}</pre>{% endif %}
      {% for name, arguments in part.calls %}
      <pre class="call"><b>{{ name }}</b> {{ arguments }}</pre>
      {% endfor %}
    </li>
  {% endfor %}
  </ol>
  <details class="tokens"><summary>{{ "{:,}".format(session.sampled) }} tokens sampled by the policy,
    {{ "{:,}".format(session.given) }} given to it</summary>
  <pre>{% for span in session.spans %}{% if span.branch %}<i>branch: encoded afresh</i>{% endif %}
<span class="{{ "sampled" if span.sampled else "given" }}" title="{{ span.title }}">{{ span.text }}</span>
{%- endfor %}</pre></details>
{% endmacro %}
{% macro side(row) %}
  <div class="side">
  {% if row %}
    <div class="tag"><span>step {{ row.step }}</span>
    {% if row.reward is number %}<span>reward {{ "%.3g" | format(row.reward) }}</span>{% endif %}
    <span class="{{ row | outcome }}">{{ row | outcome }}</span>
    {% if row.finish %}<span>{{ row.finish | text }}</span>{% endif %}</div>
    {% set session = row | transcript %}
    {% if session %}{{ conversation(session) }}{% else %}<pre>{{ row.completion | text }}</pre>{% endif %}

  {% else %}
    <div class="tag">nothing kept</div>
  {% endif %}
  </div>
{% endmacro %}
{% if broken %}
<h2>Broken problems: solved at step 0, failed now</h2>
{% for pair in broken %}
<article class="card pair">
  {% if pair.prompt %}<div class="prompt"><pre>{{ pair.prompt | text }}</pre></div>{% endif %}
  <div class="sides">{{ side(pair.before) }}{{ side(pair.after) }}</div>
</article>
{% endfor %}
{% endif %}
<h2>Completions, before and after</h2>
{% for pair in pairs %}
<article class="card pair">
  {% if pair.prompt %}<div class="prompt"><pre>{{ pair.prompt }}</pre></div>{% endif %}
  <div class="sides">{{ side(pair.before) }}{{ side(pair.after) }}</div>
</article>
{% else %}
<p class="soft">No completions were kept (tracking.samples_kept).</p>
{% endfor %}

{% if damaged_lines %}
<p class="warn small">{{ damaged_lines }}</p>
{% endif %}

<h2>Config</h2>
{% if config %}
<details class="card"><summary>All settings of the run</summary><pre>{{ config }}</pre></details>
{% else %}
<p class="soft">The run folder has no config.yaml.</p>
{% endif %}
</main>
</body>
</html>
"""
)
