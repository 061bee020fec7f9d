// Moves the page's sliders and sorts its tables. It asks nothing of any network.
(() => {
  "use strict";
  const FLOAT_BITS = 9; // as high as float stands in the strip
  const RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹";
  const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };

  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  function made(tag, name, text = "") {
    const element = document.createElement(tag);
    element.className = name;
    element.textContent = text;
    return element;
  }

  function bytes(count) {
    for (const unit of ["B", "kB", "MB"]) {
      if (count < 999.95) return unit === "B" ? `${count.toFixed(0)} B` : `${count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(1)} GB`;
  }

  function loss(value) {
    if (value === 0 || Math.abs(value) >= 1e-4) return String(Number(value.toPrecision(3)));
    const [digits, power] = value.toExponential(2).split("e");
    return `${digits}×10${[...String(Number(power))].map((sign) => RAISED[sign === "-" ? 0 : Number(sign) + 1]).join("")}`;
  }

  function bitsOf(precision, letter) {
    const found = new RegExp(`${letter}(\\d+)`).exec(precision);
    return found ? Number(found[1]) : FLOAT_BITS;
  }

  const parts = (precision) => precision.match(/[WA]\d+/g) || ["float"];
  const chips = (precision) => parts(precision).map((part) => made("span", `bits b${part.replace(/^[WA]/, "")}`, part));

  function column(name, precision) {
    const weights = bitsOf(precision, "W");
    const cell = made("span", ""), bar = made("i", `b${weights === FLOAT_BITS ? "float" : weights}`), input = made("b", "");
    bar.style.height = `${(100 * weights) / FLOAT_BITS}%`;
    input.style.bottom = `calc(${(100 * bitsOf(precision, "A")) / FLOAT_BITS}% - 1px)`;
    cell.title = `${name}: ${precision}`;
    cell.append(bar, input);
    return cell;
  }

  // A mark that follows the slider along the chart of losses.
  function marker() {
    const area = document.querySelector("#losses .area");
    if (!area) return () => {};
    const mark = document.createElementNS(area.namespaceURI, "circle");
    mark.setAttribute("class", "cursor");
    mark.setAttribute("r", 8);
    area.append(mark);
    const place = (scale, value) => {
      const [low, high, log] = scale.split(",");
      const [from, to, at] = [Number(low), Number(high), value].map((one) => (log ? Math.log10(one) : one));
      return (100 * (at - from)) / (to - from);
    };
    return (point) => {
      const across = place(area.dataset.x, point.bytes), up = place(area.dataset.y, point.loss);
      mark.style.display = [across, up].every((one) => one >= 0 && one <= 100) ? "" : "none";
      mark.setAttribute("cx", `${across}%`);
      mark.setAttribute("cy", `${100 - up}%`);
    };
  }

  // The best step of the frontier that fits a budget: its prices fall, so it is the last one that fits.
  function explore(part) {
    const { layers, start, steps, own, ...first } = read(part.dataset.explorer);
    const points = [first, ...steps];
    const slider = part.querySelector("input"), places = {}, mark = marker();
    for (const element of part.querySelectorAll("[data-show]")) places[element.dataset.show] = element;
    const key = part.dataset.explorer.replace(/-data$/, ""), cells = [];
    for (const cell of document.querySelectorAll(`[data-of="${key}"]`)) if (cell.dataset.layer) cells[Number(cell.dataset.layer)] = cell;
    const [back, on] = part.querySelectorAll("button");
    let at = 0, isOwn = true;

    function schemeAt(count) {
      const scheme = [...start];
      for (const step of steps.slice(0, count)) scheme[step.layer] = step.precision;
      return scheme;
    }

    function show(budget, runs = false) {
      isOwn = runs;
      at = 0;
      while (at < steps.length && steps[at].bytes <= budget) at += 1;
      const point = runs ? own : points[at], next = steps[at], scheme = runs ? own.scheme : schemeAt(at);
      places.budget.textContent = runs ? `${bytes(budget)}, ${part.dataset.name}` : bytes(budget);
      places.size.textContent = bytes(point.bytes);
      places.bits.textContent = point.bits.toFixed(2);
      places.loss.textContent = loss(point.loss);
      places.next.textContent = runs
        ? `The scheme of ${part.dataset.name}. Move the slider for the best scheme of another size.`
        : next
        ? `Next: ${bytes(next.bytes - point.bytes)} more give ${layers[next.layer]} ${next.precision} instead of ${scheme[next.layer]} and take ` +
          `${loss(point.loss - next.loss)} off the predicted loss, ${loss((1000 * (point.loss - next.loss)) / (next.bytes - point.bytes))} a kB.`
        : "Nothing is left to buy: more bytes lower no layer’s predicted loss.";
      slider.setAttribute("aria-valuetext", `${bytes(budget)}: ${point.bits.toFixed(2)} bits per weight, predicted loss ${loss(point.loss)}`);
      cells.forEach((cell, layer) => {
        cell.replaceChildren(...chips(scheme[layer]));
        cell.parentElement.classList.toggle("changed", scheme[layer] !== own.scheme[layer]);
      });
      places.strip.replaceChildren(...layers.map((name, layer) => column(name, scheme[layer])));
      mark(point);
      back.disabled = !isOwn && at === 0;
      on.disabled = at === steps.length;
      places.back.disabled = runs;
    }

    function go(by) {
      const from = isOwn && by < 0 && points[at].bytes < own.bytes ? at + 1 : at;
      const budget = points[Math.min(Math.max(from + by, 0), steps.length)].bytes;
      slider.value = budget;
      show(budget);
      places.status.textContent = slider.getAttribute("aria-valuetext");
    }

    function home() {
      slider.value = own.bytes;
      show(own.bytes, true);
      places.status.textContent = slider.getAttribute("aria-valuetext");
    }

    slider.addEventListener("input", () => show(Number(slider.value)));
    back.addEventListener("click", () => go(-1));
    on.addEventListener("click", () => go(1));
    places.back.addEventListener("click", home);
    part.querySelector(".controls").hidden = false;
    for (const element of document.querySelectorAll(".scripted")) element.hidden = false;
    show(own.bytes, true);
  }

  // What a cell sorts by: the bits of a precision, a number with its unit, or its text.
  function worth(cell) {
    const text = cell.textContent.trim();
    if (cell.querySelector(".bits")) return 100 * bitsOf(text, "W") + bitsOf(text, "A");
    const found = /^([-−+]?\d[\d.]*)(?:×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))? ?([kMGT])?(?:B|%|ms)?$/.exec(text);
    if (!found) return text;
    const power = [...(found[2] || "")].map((sign) => (sign === "⁻" ? "-" : RAISED.indexOf(sign) - 1)).join("");
    return Number(found[1].replace("−", "-")) * 10 ** Number(power) * (UNITS[found[3]] || 1);
  }

  function compared(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    if (typeof one === "number") return -1;
    if (typeof other === "number") return 1;
    return one.localeCompare(other, undefined, { numeric: true });
  }

  function sortable(table) {
    const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
    if (rows.length < 3) return;
    heads.forEach((head, place) => {
      const button = made("button", "sort", head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        // First the largest numbers or the first names, then the other way round, then the table's own order.
        const orders = head.classList.contains("number") ? ["descending", "ascending"] : ["ascending", "descending"];
        const order = orders[orders.indexOf(head.getAttribute("aria-sort")) + 1];
        for (const one of heads) one.removeAttribute("aria-sort");
        if (order) head.setAttribute("aria-sort", order);
        const sign = order === "descending" ? -1 : 1;
        const worths = new Map(rows.map((row) => [row, worth(row.cells[place])]));
        const empty = (row) => row.cells[place].textContent.trim() === "";
        const sorted = [...rows].sort((one, other) => empty(one) - empty(other) || sign * compared(worths.get(one), worths.get(other)));
        body.append(...(order ? sorted : rows));
      });
    });
  }

  document.querySelectorAll(".explorer").forEach(explore);
  document.querySelectorAll("table.sortable").forEach(sortable);
})();
