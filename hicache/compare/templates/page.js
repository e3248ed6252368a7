"use strict";
const zoom = document.getElementById("zoom");
const cards = document.getElementById("cards");
const [fullPan, variantPan] = zoom.querySelectorAll(".pan");
const [fullImage, variantImage, overImage] = zoom.querySelectorAll(".pan img");
const SCALES = [0, 1, 2, 4, 8, 16]; // 0: as large as fits
let button = null; // whose picture is shown
let scale = 0;

const buttonsOf = (card) => [...card.querySelectorAll(".shot button")];
const cardOf = (one) => one.closest(".card");

function show(one) {
  button = one;
  const card = cardOf(one), prompt = card.querySelector("h3").textContent;
  const full = card.querySelector(".full img");
  fullImage.src = overImage.src = full.src;
  fullImage.alt = full.alt;
  variantImage.src = one.querySelector("img").src;
  variantImage.alt = one.querySelector("img").alt;
  document.getElementById("zoom-title").textContent = prompt;
  document.getElementById("zoom-note").textContent = `${one.dataset.name}: ${one.dataset.note}`;
  zoom.querySelector("#pane-variant figcaption").textContent = one.dataset.name;
  resize();
}

function resize() {
  const full = cardOf(button).querySelector(".full img");
  for (const image of [fullImage, variantImage, overImage]) {
    const pan = image === fullImage ? fullPan : variantPan;
    const room = pan.clientWidth ? pan : image === fullImage ? variantPan : fullPan;
    const fit = Math.min(room.clientWidth / full.naturalWidth, room.clientHeight / full.naturalHeight);
    const factor = SCALES[scale] ? SCALES[scale] / devicePixelRatio : fit;
    image.style.width = `${full.naturalWidth * factor}px`;
    image.style.height = `${full.naturalHeight * factor}px`;
  }
  document.getElementById("scale").textContent = SCALES[scale] ? `${SCALES[scale]}×` : "fit";
}

function look(view) {
  if (view === "flip" && zoom.dataset.view === "flip") {
    zoom.dataset.shown = zoom.dataset.shown === "full" ? "variant" : "full";
  } else {
    zoom.dataset.view = view;
    zoom.dataset.shown = "variant";
  }
  for (const one of zoom.querySelectorAll("[data-view]")) {
    one.setAttribute("aria-pressed", one.dataset.view === zoom.dataset.view);
  }
  resize();
}

function enlarge(by) {
  scale = Math.min(SCALES.length - 1, Math.max(0, scale + by));
  resize();
}

function turn(variants, pictures) {
  const every = [...cards.children];
  const card = every[(every.indexOf(cardOf(button)) + pictures + every.length) % every.length];
  const at = buttonsOf(cardOf(button)).indexOf(button), others = buttonsOf(card);
  show(others[(at + variants + others.length) % others.length]);
}

cards.addEventListener("click", (event) => {
  const one = event.target.closest(".shot button");
  if (!one) return;
  scale = 0;
  zoom.showModal();
  button = one;
  look("beside");
  show(one);
  document.getElementById("close").focus();
});
zoom.addEventListener("close", () => button.focus()); // of the picture last seen
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
document.getElementById("close").addEventListener("click", () => zoom.close());
document.getElementById("smaller").addEventListener("click", () => enlarge(-1));
document.getElementById("larger").addEventListener("click", () => enlarge(1));
document.getElementById("previous").addEventListener("click", () => turn(-1, 0));
document.getElementById("next").addEventListener("click", () => turn(1, 0));
for (const one of zoom.querySelectorAll("button[data-view]")) {
  one.addEventListener("click", () => look(one.dataset.view));
}
const KEYS = {
  ArrowLeft: () => turn(-1, 0), ArrowRight: () => turn(1, 0), ArrowUp: () => turn(0, -1), ArrowDown: () => turn(0, 1),
  s: () => look("beside"), f: () => look("flip"), d: () => look("difference"),
  "+": () => enlarge(1), "=": () => enlarge(1), "-": () => enlarge(-1),
};
zoom.addEventListener("keydown", (event) => {
  const act = KEYS[event.key];
  const scrolls = scale > 0 && event.key.startsWith("Arrow") && event.target.classList.contains("pan");
  if (!act || scrolls || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
});
for (const [one, other] of [[fullPan, variantPan], [variantPan, fullPan]]) {
  one.addEventListener("scroll", () => { other.scrollLeft = one.scrollLeft; other.scrollTop = one.scrollTop; });
}
addEventListener("resize", () => { if (zoom.open) resize(); });
document.getElementById("order").addEventListener("change", (event) => {
  for (const index of event.target.value.split(" ")) {
    cards.append(cards.querySelector(`[data-index="${index}"]`));
  }
});
