"use strict";
// Draws the figures of the report from the JSON block of the page, and from nothing else. Every
// figure is a function of the data, its controls and the colours of the theme, and is drawn again
// when one of these changes.

(function () {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const prunedAt = data.prunings.map((pruning) => pruning.iteration);

  // -- what all figures share ----------------------------------------------------------------

  function axis(extra) {
    return Object.assign({
      gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, ticks: "outside",
      tickcolor: colour("line"), automargin: true, title: { standoff: 8 },
    }, extra);
  }

  function layout(extra) {
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      margin: { l: 60, r: 16, t: 46, b: 44 },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
      showlegend: false,
    }, extra);
  }

  // Dashed lines with a label at the prunings, over the full height of a figure.
  function pruningMarks(position) {
    const at = position || ((iteration) => iteration);
    return {
      shapes: prunedAt.map((iteration) => ({
        type: "line", xref: "x", yref: "paper", x0: at(iteration), x1: at(iteration), y0: 0, y1: 1,
        line: { color: colour("mark"), width: 2, dash: "dash" },
      })),
      annotations: prunedAt.map((iteration) => ({
        xref: "x", yref: "paper", x: at(iteration), y: 1, yanchor: "bottom", showarrow: false,
        text: "pruned after " + iteration, font: { color: colour("mark") },
      })),
    };
  }

  const figures = [];

  // draw() gives traces and layout; numbers() a list of objects, the rows that the figure shows.
  function figure(id, draw, numbers) {
    const element = byId(id);
    if (!element) return null;
    const plot = element.querySelector(".plot");
    const details = element.querySelector("details.numbers");
    const entry = {
      draw() {
        const [traces, extra, height] = draw(plot.clientWidth);
        plot.style.height = height + "px";
        Plotly.react(plot, traces, layout(Object.assign({ height }, extra)),
          // Named one by one: Plotly's own choice has a button that sends the data to its makers.
          { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
        if (details.open) fillTable(details.querySelector(".scroll"), numbers());
      },
    };
    details.addEventListener("toggle", () => {
      if (details.open) fillTable(details.querySelector(".scroll"), numbers());
    });
    element.querySelector(".download").addEventListener("click", () => {
      const source = element.querySelector(".source code").textContent;
      download(data.run + "-" + id + ".json", { run: data.run, figure: id, source, rows: numbers() });
    });
    figures.push(entry);
    entry.draw();
    return entry;
  }

  const MOST_ROWS = 1000;

  function fillTable(target, rows) {
    target.textContent = "";
    if (!rows.length) return;
    const names = Object.keys(rows[0]);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of names) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of rows.slice(0, MOST_ROWS)) {
      const line = body.insertRow();
      for (const name of names) {
        const value = row[name];
        line.insertCell().textContent = value === null ? "–" : String(value);
      }
    }
    target.append(table);
    if (rows.length > MOST_ROWS) {
      const rest = document.createElement("p");
      rest.textContent = `These are the first ${MOST_ROWS} of ${rows.length} rows; the download has all.`;
      target.append(rest);
    }
  }

  function download(name, value) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  byId("download-all").addEventListener("click", () => download(data.run + "-report.json", data));

  // -- loss, iteration time, imbalance -------------------------------------------------------

  if (data.log) {
    const log = data.log;
    const column = (rows, index) => rows.map((row) => row[index]);
    const panels = [
      { name: "loss", y: column(log.lines, 1), rows: log.lines, colour: "before", format: ":.4f" },
      { name: "ms / iteration", y: column(log.lines, 2), rows: log.lines, colour: "after", format: ":.1f" },
    ];
    if (log.loads.length) {
      panels.push({ name: "busiest rank / mean", y: column(log.loads, 1), rows: log.loads, colour: "third", format: ":.3f" });
    }
    const entry = figure("fig-run", () => {
      const gap = 0.07;
      const share = (1 - gap * (panels.length - 1)) / panels.length;
      const extra = Object.assign({ xaxis: axis({ title: { text: "iteration" }, anchor: "y" + panels.length, domain: [0, 1] }) }, pruningMarks());
      const traces = panels.map((panel, i) => {
        const suffix = i ? String(i + 1) : "";
        const top = 1 - i * (share + gap);
        extra["yaxis" + suffix] = axis({ title: { text: panel.name }, domain: [Math.max(0, top - share), top], automargin: true });
        return {
          type: "scatter", mode: panel.rows.length > 200 ? "lines" : "lines+markers", x: column(panel.rows, 0), y: panel.y,
          yaxis: "y" + suffix, line: { color: colour(panel.colour), width: 1.8 }, marker: { size: 4 },
          customdata: panel.rows.map((row) => row[3]), name: panel.name,
          hovertemplate: `iteration %{x}<br>${panel.name} %{y${panel.format}}<br>${escapeText(log.source)}, row %{customdata}<extra></extra>`,
        };
      });
      if (byId("run-clip").checked) {
        const range = withoutOutliers(panels[1].y);
        if (range) extra.yaxis2.range = range;
      }
      return [traces, extra, Math.max(420, 170 * panels.length + 60)];
    }, () => {
      const imbalance = new Map(log.loads.map((row) => [row[0], row]));
      return log.lines.map(([iteration, loss, milliseconds, row]) => {
        const load = imbalance.get(iteration);
        return {
          iteration, "lm loss": loss, "ms per iteration": milliseconds, "row in log": row,
          "imbalance (mean of layers)": load ? load[1] : null, "dead experts": load ? load[2] : null,
          "its row": load ? load[3] : null,
        };
      });
    });
    byId("run-clip").addEventListener("change", entry.draw);
  }

  // The first lines of a run and of a rebuild are many times slower and would flatten the rest.
  function withoutOutliers(values) {
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    if (sorted.length < 8) return null;
    const median = sorted[Math.floor(sorted.length / 2)];
    const usual = sorted.filter((value) => value <= 3 * median);
    const low = usual[0], high = usual[usual.length - 1];
    const pad = 0.08 * (high - low) || 1;
    return [Math.max(0, low - pad), high + pad];
  }

  function escapeText(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%/g, "&#37;");
  }

  // -- heat map --------------------------------------------------------------------------------

  if (data.history) {
    const history = data.history;
    const windows = history.windows;
    const layers = history.layer_numbers;
    const FLOOR = 1e-2; // loads below a hundredth of the mean, zero included, have the lowest colour
    const slider = byId("heat-slider");
    const view = () => document.querySelector('input[name="heat-view"]:checked').value;
    const position = { time: 0, window: windows.length - 1 };
    // In the view of one window, start where the first pruning was decided.
    const deciding = windows.filter((w) => prunedAt.length && w.last_iteration <= prunedAt[0]).length;
    if (deciding) position.window = deciding - 1;

    // Load / mean and tokens of a layer's experts in a window, by original id; null: pruned.
    function loadsOf(windowIndex, layer) {
      const window_ = windows[windowIndex];
      const tokens = window_.tokens[layer];
      const mean = tokens.reduce((sum, n) => sum + n, 0) / tokens.length || 1; // 1: no token at all
      const found = new Array(history.original_ids[0][layer].length).fill(null);
      history.original_ids[window_.stage][layer].forEach((original, current) => {
        found[original] = { tokens: tokens[current], current, relative: tokens[current] / mean };
      });
      return found;
    }

    // Iteration at which an expert is removed, or null.
    function removedAt(layer, original) {
      for (let stage = 1; stage < history.original_ids.length; stage++) {
        if (!history.original_ids[stage][layer].includes(original)) return prunedAt[stage - 1];
      }
      return null;
    }

    function order(layer, windowIndex) {
      const loads = loadsOf(windowIndex, layer);
      const ids = loads.map((_, i) => i);
      if (byId("heat-order").value === "load") {
        const key = (i) => (loads[i] ? loads[i].tokens : -1);
        ids.sort((a, b) => key(a) - key(b) || a - b);
      }
      return ids;
    }

    const shade = (cell) => (cell ? Math.log10(Math.max(cell.relative, FLOOR)) : null);

    function hover(cell, layer, original, windowIndex) {
      const head = `layer ${layers[layer]}, expert ${original}, iteration ${windows[windowIndex].last_iteration}`;
      if (!cell) return head + "<br>pruned after " + removedAt(layer, original);
      const renumbered = cell.current === original ? "" : `<br>now number ${cell.current}`;
      const gone = removedAt(layer, original);
      return `${head}<br>${cell.tokens} tokens, ${cell.relative.toPrecision(3)} of the layer's mean${renumbered}` +
        (gone === null ? "" : `<br>pruned after ${gone}`) + "<br>" + escapeText(windows[windowIndex].row);
    }

    function heatTrace(z, text, x, y) {
      const ticks = [-2, -1, 0, 1];
      const gap = z[0].length > 80 || z.length > 80 ? 0 : 1;
      return {
        type: "heatmap", z, text, x, y, hoverinfo: "text", zmin: Math.log10(FLOOR), zmax: 1, colorscale: "Cividis",
        xgap: gap, ygap: gap,
        hoverongaps: true,
        colorbar: {
          title: { text: "load / mean", side: "right" }, tickvals: ticks, thickness: 14, outlinewidth: 0,
          ticktext: ["≤ 0.01", "0.1", "1", "≥ 10"],
        },
      };
    }

    // One mark for each [column, row, cell], dark on a light cell and light on a dark one.
    function crosses(marks) {
      return {
        type: "scatter", mode: "text", x: marks.map((m) => m[0]), y: marks.map((m) => m[1]),
        text: marks.map(() => "×"), hoverinfo: "skip",
        textfont: { color: marks.map((m) => (shade(m[2]) > -0.6 ? "#000000" : "#ffffff")), size: 13 },
      };
    }

    // x: windows, evenly spaced (categories would lose the iterations between them). The prunings
    // stand between two windows.
    function drawTime() {
      const layer = position.time;
      const last = prunedAt.length ? deciding - 1 : windows.length - 1;
      const ids = order(layer, Math.max(last, 0));
      const columns = windows.map((_, i) => loadsOf(i, layer));
      const x = windows.map((_, i) => i);
      const y = ids.map((_, i) => i);
      const z = ids.map((id) => columns.map((loads) => shade(loads[id])));
      const text = ids.map((id) => columns.map((loads, i) => hover(loads[id], layer, id, i)));
      const marked = [];
      ids.forEach((id, row) => {
        const gone = removedAt(layer, id);
        if (gone === null) return;
        const lastWindow = windows.filter((w) => w.last_iteration <= gone).length - 1;
        if (lastWindow >= 0) marked.push([lastWindow, row, columns[lastWindow][id]]);
      });
      const every = Math.ceil(windows.length / 12);
      const everyExpert = Math.ceil(ids.length / 34);
      const ticks = x.filter((i) => i % every === 0 || i === windows.length - 1);
      const marks = pruningMarks((iteration) => windows.filter((w) => w.last_iteration <= iteration).length - 0.5);
      return [[heatTrace(z, text, x, y), crosses(marked)], Object.assign({
        xaxis: axis({ title: { text: "window, by its last iteration" }, tickvals: ticks, ticktext: ticks.map((i) => String(windows[i].last_iteration)), showgrid: false, range: [-0.5, windows.length - 0.5] }),
        yaxis: axis({ title: { text: "expert" }, tickvals: y.filter((i) => i % everyExpert === 0), ticktext: ids.filter((_, i) => i % everyExpert === 0).map(String), showgrid: false, range: [-0.5, ids.length - 0.5] }),
      }, marks), Math.min(Math.max(440, 16 * ids.length + 90), 760)];
    }

    function drawWindow() {
      const windowIndex = position.window;
      const orders = layers.map((_, layer) => order(layer, windowIndex));
      const cells = layers.map((_, layer) => loadsOf(windowIndex, layer));
      const width = Math.max(...orders.map((ids) => ids.length));
      const x = Array.from({ length: width }, (_, i) => i);
      const z = layers.map((_, layer) => x.map((i) => (i < orders[layer].length ? shade(cells[layer][orders[layer][i]]) : null)));
      const text = layers.map((_, layer) => x.map((i) => (i < orders[layer].length ? hover(cells[layer][orders[layer][i]], layer, orders[layer][i], windowIndex) : "")));
      const marked = [];
      layers.forEach((_, layer) => orders[layer].forEach((id, i) => {
        if (removedAt(layer, id) !== null && cells[layer][id]) marked.push([i, layer, cells[layer][id]]);
      }));
      const byLoad = byId("heat-order").value === "load";
      const everyLayer = Math.ceil(layers.length / 34);
      const shownLayers = layers.map((_, i) => i).filter((i) => i % everyLayer === 0);
      return [[heatTrace(z, text, x, layers.map((_, i) => i)), crosses(marked)], {
        xaxis: axis({ title: { text: byLoad ? "experts of each layer, least busy first" : "expert" }, showgrid: false, showticklabels: !byLoad, ticks: byLoad ? "" : "outside", range: [-0.5, width - 0.5] }),
        yaxis: axis({ title: { text: "layer" }, tickvals: shownLayers, ticktext: shownLayers.map((i) => String(layers[i])), showgrid: false, range: [layers.length - 0.5, -0.5] }),
      }, Math.min(Math.max(300, 26 * layers.length + 120), 900)];
    }

    function label() {
      const over = view() === "time";
      slider.max = String((over ? layers.length : windows.length) - 1);
      slider.value = String(position[view()]);
      slider.disabled = slider.max === "0";
      byId("heat-slider-label").textContent = over ? "Layer" : "Window";
      const shown = windows[position.window];
      const text = over ? `${layers[position.time]}` : `iteration ${shown.last_iteration}` +
        (shown.stage ? `, ${shown.stage === 1 ? "" : shown.stage + " times "}pruned` : "");
      byId("heat-value").textContent = text;
      slider.setAttribute("aria-valuetext", text);
    }

    const entry = figure("fig-heat", () => { label(); return view() === "time" ? drawTime() : drawWindow(); }, () => {
      const over = view() === "time";
      const rows = [];
      const pairs = over ? windows.map((_, i) => [i, position.time]) : layers.map((_, i) => [position.window, i]);
      for (const [windowIndex, layer] of pairs) {
        loadsOf(windowIndex, layer).forEach((cell, original) => rows.push({
          "last iteration": windows[windowIndex].last_iteration, layer: layers[layer], "original expert": original,
          "number in the window": cell ? cell.current : null, tokens: cell ? cell.tokens : null,
          "load / mean": cell ? Number(cell.relative.toPrecision(6)) : null, from: windows[windowIndex].row,
        }));
      }
      return rows;
    });
    const move = (to) => {
      position[view()] = Math.min(Math.max(to, 0), Number(slider.max));
      entry.draw();
    };
    slider.addEventListener("input", () => move(Number(slider.value)));
    byId("heat-back").addEventListener("click", () => move(position[view()] - 1));
    byId("heat-on").addEventListener("click", () => move(position[view()] + 1));
    byId("heat-order").addEventListener("change", entry.draw);
    for (const radio of document.querySelectorAll('input[name="heat-view"]')) radio.addEventListener("change", entry.draw);
  }

  // -- stability -------------------------------------------------------------------------------

  // What the job said of the loads at a pruning, and where it did not prune since they were not stable.
  function addVerdicts(extra) {
    for (const decision of data.decisions) {
      const stable = `${decision.stable_layers} of ${decision.layers} layers stable`;
      const pruned = prunedAt.indexOf(decision.iteration);
      if (pruned >= 0) extra.annotations[pruned].text += ", " + stable;
      if (decision.verdict !== "do not prune") continue;
      extra.shapes.push({
        type: "line", xref: "x", yref: "paper", x0: decision.iteration, x1: decision.iteration, y0: 0, y1: 1,
        line: { color: colour("muted"), width: 2, dash: "dash" },
      });
      extra.annotations.push({
        xref: "x", yref: "paper", x: decision.iteration, y: 1, yanchor: "bottom", showarrow: false,
        text: `not pruned after ${decision.iteration}, ${stable}`, font: { color: colour("muted") },
      });
    }
  }

  if (data.stability) {
    const changes = data.stability.changes;
    const measures = [["rank_correlation", "rank correlation", "before"], ["churn", "churn", "after"], ["load_change", "load change", "third"]];
    figure("fig-stability", () => {
      const extra = Object.assign({ xaxis: axis({ title: { text: "last iteration of the later window" }, anchor: "y3", domain: [0, 1] }) }, pruningMarks());
      addVerdicts(extra);
      const traces = [];
      measures.forEach(([key, name, shade], i) => {
        const suffix = i ? String(i + 1) : "";
        const top = 1 - i * 0.36;
        extra["yaxis" + suffix] = axis({ title: { text: name }, domain: [Math.max(0, top - 0.28), top], rangemode: key === "rank_correlation" ? "normal" : "tozero" });
        extra.shapes.push({
          type: "line", xref: "paper", x0: 0, x1: 1, yref: "y" + suffix, y0: data.stability.thresholds[key], y1: data.stability.thresholds[key],
          layer: "below", line: { color: colour("muted"), width: 1, dash: "dashdot" },
        });
        for (const which of ["median", "worst"]) {
          traces.push({
            type: "scatter", mode: "lines+markers", x: changes.map((c) => c.to), y: changes.map((c) => (c[key] ? c[key][which] : null)),
            yaxis: "y" + suffix, name: which === "median" ? "median of the layers" : "worst layer", legendgroup: which, showlegend: i === 0,
            line: { color: colour(shade), width: which === "median" ? 2 : 1.2, dash: which === "median" ? "solid" : "dot" },
            marker: { size: which === "median" ? 5 : 4, symbol: which === "median" ? "circle" : "x-thin-open" },
            text: changes.map((c) => (c[key] && which === "worst" ? ` (layer ${c[key].worst_layer})` : "")),
            customdata: changes.map((c) => [c.from, escapeText(c.row)]),
            hovertemplate: `${name}, ${which} %{y:.3f}%{text}<br>from %{customdata[0]} to %{x}<br>%{customdata[1]}<extra></extra>`,
          });
        }
      });
      return [traces, Object.assign(extra, { showlegend: false }), 520];
    }, () => changes.map((c) => {
      const row = { from: c.from, to: c.to };
      for (const [key, name] of measures) {
        row[name + ", median"] = c[key] ? c[key].median : null;
        row[name + ", worst"] = c[key] ? c[key].worst : null;
        row["in layer" + " (" + name + ")"] = c[key] ? c[key].worst_layer : null;
      }
      return Object.assign(row, { "layers within all thresholds": c.layers_within, "of layers": c.layers, source: c.row });
    }));
  }

  // -- each pruning ----------------------------------------------------------------------------

  data.prunings.forEach((pruning, index) => {
    const numbers = pruning.layers.map((layer) => layer.layer_number);
    const layerAxis = () => axis({ title: { text: "layer" }, showgrid: false, dtick: numbers.length > 24 ? undefined : 1 });

    figure("fig-kept-" + index, () => {
      const bar = (name, key, shade, pattern) => ({
        type: "bar", name, x: numbers, y: pruning.layers.map((layer) => layer[key].length),
        marker: { color: pattern ? "rgba(0,0,0,0)" : colour(shade), line: { color: colour(shade), width: numbers.length > 60 ? 0.5 : 1 }, pattern: pattern ? { shape: "/", size: 6, solidity: 0.25, fgcolor: colour(shade), bgcolor: "rgba(0,0,0,0)" } : undefined },
        text: pattern || numbers.length > 24 ? undefined : pruning.layers.map((layer) => layer.kept.length + (numbers.length > 6 ? "" : ` of ${layer.kept.length + layer.pruned.length}`)),
        textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { color: colour("panel") },
        hovertemplate: `layer %{x}: %{y} ${name}<extra></extra>`,
      });
      return [[bar("kept", "kept", "before", false), bar("pruned", "pruned", "muted", true)], {
        barmode: "stack", bargap: numbers.length > 24 ? 0.15 : 0.45, showlegend: true, xaxis: layerAxis(), yaxis: axis({ title: { text: "experts" } }),
      }, 330];
    }, () => pruning.layers.map((layer) => ({ layer: layer.layer_number, kept: layer.kept.length, pruned: layer.pruned.length, "kept, old numbers in new order": layer.kept.join(" ") })));

    figure("fig-imbalance-" + index, () => {
      const rows = pruning.table.rows;
      const dots = (name, key, shade, symbol) => ({
        type: "scatter", mode: "markers", name, x: numbers, y: rows.map((row) => row[key]),
        marker: { color: colour(shade), size: numbers.length > 60 ? 7 : 11, symbol, line: { width: 2, color: colour(shade) } },
        hovertemplate: `layer %{x}, ${name}: %{y:.3f}<extra></extra>`,
      });
      const links = { type: "scatter", mode: "lines", x: [], y: [], hoverinfo: "skip", showlegend: false, line: { color: colour("muted"), width: 1 } };
      rows.forEach((row) => {
        links.x.push(row.layer_number, row.layer_number, null);
        links.y.push(row.imbalance_before, row.imbalance_after, null);
      });
      return [[links, dots("before", "imbalance_before", "before", "circle-open"), dots("after", "imbalance_after", "after", "diamond")], {
        showlegend: true, xaxis: layerAxis(), yaxis: axis({ title: { text: "busiest rank / mean" } }),
      }, 330];
    }, () => pruning.table.rows.map((row) => ({ layer: row.layer_number, before: row.imbalance_before, after: row.imbalance_after })));

    const select = byId("ranks-layer-" + index);
    const worst = (layer) => Math.max(...layer.rank_tokens_before) * layer.rank_tokens_before.length / layer.rank_tokens_before.reduce((a, b) => a + b, 0);
    const byWorst = pruning.layers.map((layer, i) => [worst(layer), i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    select.value = String(byWorst[0][1]);
    const entry = figure("fig-ranks-" + index, () => {
      const layer = pruning.layers[Number(select.value)];
      const bars = (name, tokens, shade, pattern) => {
        const mean = tokens.reduce((a, b) => a + b, 0) / tokens.length;
        return {
          type: "bar", name, x: tokens.map((_, i) => i), y: tokens.map((n) => n / mean), customdata: tokens,
          text: tokens.length > 16 ? undefined : tokens.map((n) => (n / mean).toFixed(2)), textposition: "outside", cliponaxis: false, textfont: { color: colour("text") },
          marker: { color: pattern ? "rgba(0,0,0,0)" : colour(shade), line: { color: colour(shade), width: 1 }, pattern: pattern ? { shape: "\\", size: 6, solidity: 0.25, fgcolor: colour(shade), bgcolor: "rgba(0,0,0,0)" } : undefined },
          hovertemplate: `rank %{x}, ${name}: %{customdata} tokens, %{y:.3f} of the mean<extra></extra>`,
        };
      };
      const most = Math.max(layer.rank_tokens_before.length, layer.rank_tokens_after.length);
      return [[bars("before", layer.rank_tokens_before, "before", true), bars("after", layer.rank_tokens_after, "after", false)], {
        showlegend: true, barmode: "group", bargap: most > 8 ? 0.2 : 0.4, xaxis: axis({ title: { text: "expert-parallel rank" }, showgrid: false, dtick: most > 32 ? undefined : 1 }),
        yaxis: axis({ title: { text: "load / mean rank" }, rangemode: "tozero" }),
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y", y0: 1, y1: 1, layer: "below", line: { color: colour("text"), width: 1.5, dash: "dot" } }],
      }, 330];
    }, () => pruning.layers.flatMap((layer) => ["before", "after"].flatMap((when) => layer["rank_tokens_" + when].map((tokens, rank) => ({ layer: layer.layer_number, when, rank, tokens })))));
    select.addEventListener("change", entry.draw);
  });

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach((entry) => entry.draw()));
  root.dataset.figures = String(figures.length);
})();
