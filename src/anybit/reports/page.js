// Moves the page's sliders. It asks nothing of any network.
(() => {
  "use strict";
  const FLOAT_BITS = 9; // as high as float stands in the strip

  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  function bytes(count) {
    for (const unit of ["B", "kB", "MB"]) {
      if (count < 999.95) return unit === "B" ? `${count.toFixed(0)} B` : `${count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(1)} GB`;
  }

  const loss = (value) => (value === 0 || Math.abs(value) >= 1e-4 ? String(Number(value.toPrecision(3))) : value.toExponential(2));

  function bitsOf(precision, letter) {
    const found = new RegExp(`${letter}(\\d+)`).exec(precision);
    return found ? Number(found[1]) : FLOAT_BITS;
  }

  function column(name, precision) {
    const cell = document.createElement("span"), weights = document.createElement("i"), input = document.createElement("b");
    const share = (letter) => `${(100 * bitsOf(precision, letter)) / FLOAT_BITS}%`;
    weights.style.height = share("W");
    input.style.bottom = `calc(${share("A")} - 1px)`;
    cell.title = `${name}: ${precision}`;
    cell.append(weights, input);
    return cell;
  }

  // The best step of the frontier that fits a budget: its prices fall, so it is the last one that fits.
  function explore(part) {
    const { layers, start, steps, ...first } = read(part.dataset.explorer);
    const points = [first, ...steps];
    const slider = part.querySelector("input"), places = {};
    for (const element of part.querySelectorAll("[data-show]")) places[element.dataset.show] = element;
    const cells = [...part.querySelectorAll("[data-layer]")];
    const [back, on] = part.querySelectorAll("button");
    let at = 0;

    function schemeAt(count) {
      const scheme = [...start];
      for (const step of steps.slice(0, count)) scheme[step.layer] = step.precision;
      return scheme;
    }

    function show(budget) {
      at = 0;
      while (at < steps.length && steps[at].bytes <= budget) at += 1;
      const point = points[at], next = steps[at], scheme = schemeAt(at);
      places.budget.textContent = bytes(budget);
      places.size.textContent = bytes(point.bytes);
      places.bits.textContent = point.bits.toFixed(2);
      places.loss.textContent = loss(point.loss);
      places.next.textContent = next
        ? `Next: ${bytes(next.bytes - point.bytes)} more give ${layers[next.layer]} ${next.precision} instead of ${scheme[next.layer]} and take ` +
          `${loss(point.loss - next.loss)} off the predicted loss, ${loss((1000 * (point.loss - next.loss)) / (next.bytes - point.bytes))} a kB.`
        : "Nothing is left to buy: more bytes lower no layer’s predicted loss.";
      slider.setAttribute("aria-valuetext", `${bytes(budget)}: ${point.bits.toFixed(2)} bits per weight, predicted loss ${loss(point.loss)}`);
      cells.forEach((cell, layer) => {
        cell.textContent = scheme[layer];
        cell.parentElement.classList.toggle("changed", scheme[layer] !== cell.previousElementSibling.textContent);
      });
      places.strip.replaceChildren(...layers.map((name, layer) => column(name, scheme[layer])));
      back.disabled = at === 0;
      on.disabled = at === steps.length;
    }

    function go(by) {
      const budget = points[Math.min(Math.max(at + by, 0), steps.length)].bytes;
      slider.value = budget;
      show(budget);
      places.status.textContent = slider.getAttribute("aria-valuetext");
    }

    slider.addEventListener("input", () => show(Number(slider.value)));
    back.addEventListener("click", () => go(-1));
    on.addEventListener("click", () => go(1));
    part.querySelector(".controls").hidden = false;
    show(Number(slider.value));
  }

  document.querySelectorAll(".explorer").forEach(explore);
})();
