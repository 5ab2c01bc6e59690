"use strict";
const panels = JSON.parse(document.getElementById("panels").textContent);
const hidden = new Set();

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  return { ink: colour("--soft"), grid: colour("--grid"), paper: colour("--paper"), line: colour("--line") };
}

function ticks(panel) {
  if (!panel.log) return {};
  const values = panel.traces.flatMap((trace) => trace.y).filter((y) => y > 0);
  const decades = Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)));
  return { type: "log", tickformat: "~g", ...(decades > 0.7 && decades < 3 && { dtick: "D2" }) };
}

function layout(panel) {
  const { ink, grid, paper, line } = theme();
  const axis = { gridcolor: grid, linecolor: line, zeroline: false, automargin: true, title: { standoff: 6 } };
  const places = panel.ticks && {
    tickvals: panel.ticks[0], ticktext: panel.ticks[1], range: [-0.5, panel.ticks[0].length - 0.5], showgrid: false,
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    margin: { l: 44, r: 8, t: 8, b: 40 }, font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: paper, namelength: -1 },
    xaxis: { ...axis, title: { ...axis.title, text: panel.x }, ...places },
    yaxis: { ...axis, title: { ...axis.title, text: panel.y }, ...ticks(panel) },
  };
}

function draw(div) {
  const panel = panels[div.dataset.panel];
  const data = panel.traces.map((trace) => ({ ...trace, visible: !hidden.has(trace.meta) }));
  Plotly.react(div, data, layout(panel), { responsive: true, displaylogo: false, displayModeBar: false });
  div.dataset.drawn = "yes";
}

const plots = [...document.querySelectorAll(".plot")];
const redraw = () => plots.filter((div) => div.dataset.drawn).forEach(draw);

const watcher = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    watcher.unobserve(target);
    draw(target);
  }
}, { rootMargin: "600px" });
plots.forEach((div) => watcher.observe(div));

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const method = button.dataset.method;
    if (!hidden.delete(method)) hidden.add(method);
    for (const twin of document.querySelectorAll(".legend button"))
      twin.setAttribute("aria-pressed", String(!hidden.has(twin.dataset.method)));
    redraw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => plots.filter((div) => div.offsetParent).forEach(draw));
