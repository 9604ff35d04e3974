"use strict";
// One page, one world. The layouts of the binary messages are those of protocol.py.

const $ = (id) => document.getElementById(id);
const FRAME = 1, CONTROLS = 2, HEADER_BYTES = 44, CONTROLS_BYTES = 52;
const BUSY = { moved: 4001, idle: 4002, full: 1013, bad: 1008 };
const DEG_PER_PX = 0.15, DEG_PER_TOUCHED_PX = 0.35;
const SPARE_MS = 12;  // by which the next block comes early
const token = new URLSearchParams(location.search).get("token");
const address = (path, words = {}) => {
  const url = new URL(path, location.href);
  url.search = new URLSearchParams({ ...words, ...(token ? { token } : {}) });
  return url;
};

// ---------------------------------------------------------------- what the player does: a state, never events
const controls = {
  counter: 0, held: new Set(), taps: new Map(), mouse: [0, 0], turn: [0, 0], pad: [0, 0], padKeys: 0,
  pending: [],  // [counter, ms] of changes that no frame on the screen has answered yet
};
let bits = new Map();  // from an input's code to the key's number
let turns = new Map();  // from an input's code to a direction (pitch, yaw)
let caps = [];

const NAMED = {
  forward: "KeyW", back: "KeyS", left: "KeyA", right: "KeyD", jump: "Space", crouch: "KeyC", sneak: "KeyC",
  sprint: "ShiftLeft", walk: "ShiftLeft", attack: "Mouse0", fire: "Mouse0", use: "Mouse2", zoom: "Mouse2", reload: "KeyR",
};
const SPARE_KEYS = ["KeyE", "KeyQ", "KeyF", "KeyG", "KeyZ", "KeyX", "KeyV", "KeyT", "KeyY", "KeyH", "KeyB", "KeyU"];
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };

function bindKeys(game) {
  bits = new Map();
  const free = [...SPARE_KEYS];
  game.keys.forEach((name, i) => {
    const cap = game.caps[i];
    if (!cap) return;
    let code = NAMED[name];
    if (/^[A-Z]$/.test(cap) && !["L", "R"].includes(cap)) code = `Key${cap}`;
    if (/^[0-9]$/.test(cap)) code = `Digit${cap}`;
    if (!game.mouse && ["left", "right"].includes(cap)) code = cap === "left" ? "ArrowLeft" : "ArrowRight";
    if (!code || bits.has(code)) code = free.find((spare) => !bits.has(spare));
    if (code) bits.set(code, i);
  });
  turns = new Map(game.mouse ? Object.entries(ARROWS) : []);
  drawCaps(game);
}

function changed() {
  controls.counter += 1;
  controls.pending.push([controls.counter, performance.now()]);
  if (controls.pending.length > 500) controls.pending.shift();
  sendControls();
  lightCaps();
}

function press(code, down) {
  if (down === controls.held.has(code)) return;
  if (down) {
    controls.held.add(code);
    controls.taps.set(code, controls.counter + 1);  // even if it is released before the next block
  } else controls.held.delete(code);
  changed();
}

function releaseAll() {
  if (!controls.held.size && !controls.taps.size && !controls.padKeys) return;
  controls.held.clear();
  controls.taps.clear();
  controls.padKeys = 0;
  controls.pad = [0, 0];
  changed();
}

function heldBits() {
  let held = controls.padKeys;
  for (const code of [...controls.held, ...controls.taps.keys()]) if (bits.has(code)) held |= 1 << bits.get(code);
  return held >>> 0;
}

function turning() {
  const turn = [...controls.pad];
  for (const code of new Set([...controls.held, ...controls.taps.keys()])) {
    const way = turns.get(code);
    if (way) { turn[0] += way[0]; turn[1] += way[1]; }
  }
  return turn.map((value) => Math.max(-1, Math.min(1, value)));
}

function look(dx, dy, degrees) {
  if (!game || !game.mouse || !playing()) return;
  controls.mouse[0] -= dy * degrees;
  controls.mouse[1] += dx * degrees;
  gauge.push([performance.now(), -dy * degrees, dx * degrees]);
  changed();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=range]")) return;
  if (bits.has(event.code) || turns.has(event.code)) {
    event.preventDefault();
    if (!event.repeat) { press(event.code, true); wakeUp(); }
  } else if (!event.repeat && !event.target.matches("button")) {
    const tool = { KeyP: "pause", Backspace: "reset", KeyN: "seed" }[event.code];
    if (tool) { event.preventDefault(); $(tool).click(); }
  }
});
addEventListener("keyup", (event) => press(event.code, false));
addEventListener("blur", releaseAll);
document.addEventListener("pointerlockchange", () => { if (!document.pointerLockElement) releaseAll(); showHint(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) { releaseAll(); pause(true); } });

const screen = $("screen");
screen.addEventListener("contextmenu", (event) => event.preventDefault());
screen.addEventListener("pointerdown", (event) => {
  screen.focus();
  wakeUp();
  if (event.pointerType !== "mouse") screen.setPointerCapture(event.pointerId);
  else if (document.pointerLockElement === screen) press(`Mouse${event.button}`, true);
  else if (game && game.mouse) Promise.resolve(screen.requestPointerLock()).catch(() => {});  // where it is not allowed
});
addEventListener("pointerup", (event) => { if (event.pointerType === "mouse") press(`Mouse${event.button}`, false); });
document.addEventListener("mousemove", (event) => {
  if (document.pointerLockElement === screen) look(event.movementX, event.movementY, DEG_PER_PX);
});
const touched = new Map();
let dragging = false;  // has been done once: the hint is understood
function dragged(event) {
  if (event.pointerType === "mouse") return;
  const before = touched.get(event.pointerId);
  touched.set(event.pointerId, [event.clientX, event.clientY]);
  if (before && !dragging) { dragging = true; showHint(); }
  if (before) look(event.clientX - before[0], event.clientY - before[1], DEG_PER_TOUCHED_PX);
}
for (const surface of [screen, $("gauge")]) {
  surface.addEventListener("pointermove", dragged);
  for (const end of ["pointerup", "pointercancel"]) surface.addEventListener(end, (event) => touched.delete(event.pointerId));
}
$("gauge").addEventListener("pointerdown", (event) => $("gauge").setPointerCapture(event.pointerId));

function readGamepad() {
  const pad = [...(navigator.getGamepads ? navigator.getGamepads() : [])].find((one) => one && one.connected);
  if (!pad || !game) return;
  const live = (value) => (Math.abs(value || 0) > 0.18 ? value : 0);
  const [x, y, yaw, pitch] = pad.axes.map(live);
  let held = 0;
  const hold = (name, on) => { const i = game.keys.indexOf(name); if (on && i >= 0) held |= 1 << i; };
  hold("left", x < -0.4); hold("right", x > 0.4); hold("forward", y < -0.4); hold("back", y > 0.4);
  const button = (i) => pad.buttons[i] && pad.buttons[i].pressed;
  hold("jump", button(0)); hold("attack", button(7)); hold("fire", button(7)); hold("use", button(6));
  const turn = game.mouse ? [-(pitch || 0), yaw || 0] : [0, 0];
  if (held === controls.padKeys && turn.every((value, i) => Math.abs(value - controls.pad[i]) < 0.02)) return;
  controls.padKeys = held;
  controls.pad = turn;
  changed();
}

// ---------------------------------------------------------------- what is drawn of it
function drawCaps(game) {
  caps = [];
  $("cross").replaceChildren();
  [...$("keys").children].slice(1).forEach((cap) => cap.remove());
  const place = { W: "1 / 2", A: "2 / 1", S: "2 / 2", D: "2 / 3" };
  for (const [code, i] of bits) {
    const cap = document.createElement("button"), label = game.caps[i];
    cap.className = "cap";
    cap.textContent = label.length > 1 ? label.replace("_", " ") : label;
    cap.title = game.keys[i];
    cap.tabIndex = -1;
    if (place[label]) { cap.style.gridArea = place[label]; $("cross").append(cap); } else $("keys").append(cap);
    cap.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      cap.setPointerCapture(event.pointerId);
      wakeUp();
      press(code, true);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) cap.addEventListener(end, () => press(code, false));
    cap.addEventListener("contextmenu", (event) => event.preventDefault());
    caps.push([cap, code, i]);
  }
  $("cross").hidden = !$("cross").children.length;
  $("gauge").style.display = game.mouse ? "" : "none";
}

function lightCaps() {
  for (const [cap, code, i] of caps) cap.classList.toggle("held", controls.held.has(code) || Boolean(controls.padKeys >> i & 1));
}

const gauge = [];  // [ms, pitch, yaw] in degrees that the mouse has turned
function drawGauge(now) {
  while (gauge.length && gauge[0][0] < now - 120) gauge.shift();
  const turn = turning(), frames = game ? 0.12 * game.fps : 1, most = game ? game.mouse_limit_deg : 1;
  const sum = gauge.reduce((total, [, pitch, yaw]) => [total[0] + pitch, total[1] + yaw], [0, 0]);
  let [y, x] = [0, 1].map((i) => sum[i] / frames / most + turn[i] * 0.8);
  const far = Math.hypot(x, y);
  if (far > 1) { x /= far; y /= far; }
  const line = document.querySelector("#gauge line"), tip = $("tip");
  line.setAttribute("x2", x * 40); line.setAttribute("y2", -y * 40);
  tip.setAttribute("cx", x * 40); tip.setAttribute("cy", -y * 40);
}

let toastTimer = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.remove("away");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.add("away"), 5000);
}

function veil(title, text = "", button = "") {
  const [strong, p, action] = $("veil").children;
  $("veil").classList.toggle("shown", Boolean(title));
  if (!title) return;
  strong.textContent = title;
  p.textContent = text;
  action.textContent = button;
  action.hidden = !button;
}
$("veil").lastElementChild.addEventListener("click", () => wakeUp(true));

function showHint() {
  const wanted = game && game.mouse && playing() && document.pointerLockElement !== screen && !dragging;
  const fine = matchMedia("(pointer: fine)").matches;
  $("hint").textContent = fine ? "Click to look around with the mouse, Esc lets it go" : "Drag on the picture to look around";
  $("hint").classList.toggle("away", !wanted);
}

function state(kind, text) {
  $("state").className = kind;
  $("state").firstElementChild.textContent = text;
}

// ---------------------------------------------------------------- playing out
let game = null, socket = null, paused = false, over = "";
const playout = {
  frames: [],  // decoded, in order, of one block at most
  decoding: Promise.resolve(), world: 0,
  wanted: 0,  // the block that is needed next
  asked: 0,  // ms when it was asked for; 0: not yet
  due: 0,  // ms at which the next frame is to be shown
  trip: 150, jitter: 40, trips: 0,  // ms from asking for a block to its first frame, and how often it was measured
  glowed: 0,
  shown: [],  // ms of the newest frames on the screen
  late: [],  // ms at which there was no frame to show
  latencies: [], newest: NaN, frame: -1,
};
const playing = () => Boolean(game && socket && socket.readyState === 1 && !paused && !over);

function bufferedMs(now) {
  const period = 1000 / game.fps;
  return playout.frames.length ? Math.max(0, playout.due - now) + playout.frames.length * period : Math.max(0, playout.due - now);
}

function ask(now) {
  // As late as possible: what is pressed until then is answered.
  if (!playing() || playout.asked) return;
  if (bufferedMs(now) > playout.trip + 2 * playout.jitter + SPARE_MS) return;
  playout.asked = now;
  sendControls();
}

function tick(now) {
  readGamepad();
  drawGauge(now);
  if (playing() && playout.frames.length && now >= playout.due - 4) {
    const period = 1000 / game.fps, frame = playout.frames.shift();
    if (now - playout.due > 2 * period) {
      if (playout.frame > 0 && playout.shown.length) playout.late.push(now);
      playout.due = now;
    }
    playout.due += period;
    show(frame, now);
  }
  if (game) ask(now);
}

function show({ picture, header }, now) {
  const { width, height } = fit(picture);
  const context = screen.getContext("2d", { alpha: false });
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  if (now - playout.glowed > 1000) glow(picture, now);
  picture.close();
  while (controls.pending.length && controls.pending[0][0] <= header.counter) {
    playout.newest = now - controls.pending.shift()[1];
    playout.latencies.push(playout.newest);
    if (playout.latencies.length > 300) playout.latencies.shift();
  }
  playout.shown.push(now);
  playout.frame = header.frame;
  playout.making = header.making;
}

const tint = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
function glow(picture, now) {
  playout.glowed = now;
  tint.drawImage(picture, 0, 0, 1, 1);
  const [red, green, blue] = tint.getImageData(0, 0, 1, 1).data;
  screen.style.setProperty("--glow", `rgb(${red} ${green} ${blue} / 0.4)`);
}

let box = 0;  // px of the screen, as the device has them
new ResizeObserver(([{ contentRect }]) => { box = contentRect.width * (devicePixelRatio || 1); }).observe(screen);
function fit(picture) {
  // Smooth up to four times the game's size; the rest of the way is the browser's: without a graphics card every pixel counts.
  const times = Math.max(1, Math.min(4, Math.ceil(box / picture.width)));
  const width = times * picture.width, height = times * picture.height;
  if (screen.width !== width || screen.height !== height) { screen.width = width; screen.height = height; }
  return { width, height };
}

function takeFrame(data) {
  const view = new DataView(data), arrived = performance.now();
  const header = {
    index: view.getUint16(2, true), block: view.getUint32(12, true), frame: view.getUint32(16, true),
    counter: view.getUint32(20, true), making: [32, 36, 40].reduce((sum, at) => sum + view.getFloat32(at, true), 0),
  };
  const jpeg = new Blob([new Uint8Array(data, HEADER_BYTES)], { type: "image/jpeg" });
  const picture = createImageBitmap(jpeg), world = playout.world;
  if (header.index === 0) {
    for (const [code, counter] of controls.taps) if (counter <= header.counter) controls.taps.delete(code);
    if (playout.asked) {
      const trip = arrived - playout.asked;
      playout.trips += 1;
      const weight = Math.max(0.15, 1 / (1 + playout.trips));
      playout.jitter += weight * (Math.abs(trip - playout.trip) - playout.jitter);
      playout.trip += weight * (trip - playout.trip);
    }
    playout.asked = 0;
    playout.wanted = header.block + 1;
  }
  playout.decoding = playout.decoding.then(() => picture).then((decoded) => {
    if (world === playout.world) playout.frames.push({ picture: decoded, header });
    else decoded.close();
  }).catch(() => {});  // a picture that cannot be decoded is left out
}

function newWorld(seed) {
  playout.world += 1;
  for (const { picture } of playout.frames) picture.close();
  Object.assign(playout, { frames: [], asked: 0, due: 0, wanted: 0, frame: -1, shown: [], late: [] });
  controls.pending = [];
  $("number").textContent = seed;
}

const quantile = (values, q) => [...values].sort((a, b) => a - b)[Math.max(0, Math.ceil(q * values.length) - 1)];
const inMs = (value) => (Number.isFinite(value) ? `${Math.round(value)} ms` : "–");

function showFigures() {
  const now = performance.now();
  for (const list of [playout.shown, playout.late]) while (list.length && list[0] < now - 2000) list.shift();
  if (!game) return;
  const span = playout.shown.length > 1 ? playout.shown.at(-1) - playout.shown[0] : 0;
  const fps = span ? 1000 * (playout.shown.length - 1) / span : 0;
  $("fps").textContent = fps ? fps.toFixed(1) : "–";
  $("latency").textContent = inMs(quantile(playout.latencies, 0.5));
  $("p95").textContent = inMs(quantile(playout.latencies, 0.95));
  $("making").textContent = inMs(playout.making);
  const seconds = Math.floor((playout.frame + 1) / game.fps);
  $("played").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  if (!playing() || !fps) return;
  const slow = fps < 0.9 * game.fps;
  state(slow ? "slow" : "live", slow ? `slower than real time: ${fps.toFixed(1)} of ${game.fps} fps` : `live at ${fps.toFixed(1)} fps`);
}

// ---------------------------------------------------------------- talking to the server
function sendControls() {
  if (!socket || socket.readyState !== 1 || !game) return;
  const view = new DataView(new ArrayBuffer(CONTROLS_BYTES)), turn = turning();
  const asking = playout.asked ? playout.wanted : Math.max(0, playout.wanted - 1);
  view.setUint16(0, CONTROLS, true);
  controls.counter += 1;
  view.setUint32(4, controls.counter, true);
  view.setUint32(8, asking, true);
  view.setUint32(12, heldBits(), true);
  view.setFloat64(16, performance.now(), true);
  view.setFloat64(24, controls.mouse[0], true);
  view.setFloat64(32, controls.mouse[1], true);
  view.setFloat32(40, turn[0], true);
  view.setFloat32(44, turn[1], true);
  view.setFloat32(48, playout.newest, true);
  playout.newest = NaN;
  socket.send(view.buffer);
}

const say = (command) => { if (socket && socket.readyState === 1) socket.send(JSON.stringify(command)); };

function hear(message) {
  if (message.kind === "warming") {
    state("", "warming up");
    veil("Waking the world", "The model is being loaded. This takes a few seconds.");
  } else if (message.kind === "busy") {
    state("", "waiting in line");
    veil(`You are number ${message.place} in line`, "Everybody who may play is playing. Your world starts by itself when it is your turn.");
  } else if (message.kind === "welcome") welcome(message);
  else if (message.kind === "world") newWorld(message.seed);
  else if (message.kind === "error") toast(message.text);
}

function welcome(facts) {
  game = facts;
  sessionStorage.setItem("worldloom", facts.key);
  for (const [name, value] of [["--w", facts.size[0]], ["--h", facts.size[1]]]) document.documentElement.style.setProperty(name, value);
  $("game").textContent = facts.game;
  bindKeys(facts);
  newWorld(facts.seed);
  playout.wanted = facts.block;
  Object.assign(controls, { counter: 0, mouse: [0, 0] });
  controls.taps.clear();
  for (const name of ["steps", "guidance"]) {
    $(name).max = facts.most[name];
    $(name).value = facts[name];
    $(`${name}-value`).textContent = facts[name];
  }
  $("steps").disabled = facts.few_steps.length > 0;
  drawStarts();
  veil("");
  paused = false;
  showPause();
  state("live", "live");
  setTimeout(() => $("hint").classList.add("away"), 8000);  // whoever plays by keys alone has read it
}

function connect() {
  const url = address("play", { key: sessionStorage.getItem("worldloom") || "" });
  url.protocol = url.protocol.replace("http", "ws");
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") hear(JSON.parse(data));
    else if (new DataView(data).getUint16(0, true) === FRAME) takeFrame(data);
  };
  socket.onclose = ({ code, reason }) => {
    releaseAll();
    socket = null;
    if (code === BUSY.idle) [over] = ["idle", state("", "asleep"), veil("The world fell asleep", "Nobody touched it for a while, so its place went to others.", "Start again")];
    else if (code === BUSY.moved) [over] = ["moved", state("", "elsewhere"), veil("This world is played in another tab", "", "Start another one here")];
    else if (code === BUSY.full || code === BUSY.bad) [over] = ["refused", state("gone", "refused"), veil("The server said no", reason, "Try again")];
    else {
      state("gone", "no server");
      veil("The server is gone", "Looking for it. Your world goes on when it is found within a minute.");
      setTimeout(connect, 1000);
    }
    showHint();
  };
}

function wakeUp(pressed = false) {
  if (over && pressed) {
    if (over === "moved") sessionStorage.removeItem("worldloom");
    over = "";
    veil("Connecting");
    connect();
  } else if (paused && pressed) pause(false);
}

// ---------------------------------------------------------------- buttons, gallery, sliders
function showPause() {
  $("pause").lastElementChild.textContent = paused ? "Go on" : "Pause";
  $("pause").classList.toggle("on", paused);
  $("pause").querySelector("path").setAttribute("d", paused ? "M8 5l11 7-11 7z" : "M8 5v14M16 5v14");
  showHint();
}

function pause(on) {
  if (!game || over || !socket || on === paused) return;
  paused = on;
  playout.due = performance.now();
  playout.shown = [];
  playout.asked = 0;
  controls.pending = [];
  if (paused) state("", "paused");
  veil(paused ? "Paused" : "", "The world waits for you.", "Go on");
  showPause();
}

const restart = (words) => { pause(false); say({ do: "reset", ...words }); };
$("pause").addEventListener("click", () => pause(!paused));
$("reset").addEventListener("click", () => restart({}));
$("seed").addEventListener("click", () => restart({ seed: Math.floor(Math.random() * 2 ** 32) }));
for (const button of document.querySelectorAll("#tools button")) button.addEventListener("click", () => button.blur());

function drawStarts() {
  for (const old of document.querySelectorAll(".start[data-number]")) old.remove();
  for (let i = 0; i < game.starts; i += 1) addStart(i, address(`starts/${i}.png`).href);
  markStart(0);
}

function addStart(number, source) {
  const button = document.createElement("button"), image = new Image();
  button.className = "start";
  button.dataset.number = number;
  button.setAttribute("aria-label", number < 0 ? "your picture" : `start picture ${number + 1}`);
  image.src = source;
  image.alt = "";
  button.append(image);
  button.addEventListener("click", () => { markStart(number); restart({ start: number }); button.blur(); });
  $("bring").before(button);
}

function markStart(number) {
  for (const button of document.querySelectorAll(".start")) button.classList.toggle("on", Number(button.dataset.number) === number);
}

const ours = (path) => address(path, { key: game.key });
$("bring").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { const [file] = $("file").files; $("file").value = ""; if (file) bring(file); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) bring(event.dataTransfer.files[0]); });

async function bring(file) {
  if (!game) return;
  try {
    const answer = await fetch(ours("picture"), { method: "POST", body: file });
    if (!answer.ok) return toast(await answer.text());
    document.querySelector('.start[data-number="-1"]')?.remove();
    addStart(-1, URL.createObjectURL(await answer.blob()));
    markStart(-1);
    restart({ start: -1 });
  } catch { toast("The picture could not be sent: it is too large, or the server is gone"); }
}

$("record").addEventListener("click", async () => {
  if (!game) return;
  toast("Writing the episode");
  try {
    const answer = await fetch(ours("episode"), { method: "POST" });
    if (!answer.ok) return toast(await answer.text());
    if (answer.headers.get("content-type").startsWith("application/json")) {
      const { name, frames } = await answer.json();
      return toast(`Saved ${frames} frames as ${name}`);
    }
    const link = document.createElement("a");
    link.download = /filename="(.*)"/.exec(answer.headers.get("content-disposition"))[1];
    link.href = URL.createObjectURL(await answer.blob());
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    toast(`Downloaded ${link.download}`);
  } catch { toast("The episode could not be fetched: the server is gone"); }
});

for (const name of ["steps", "guidance"]) {
  $(name).addEventListener("input", () => { $(`${name}-value`).textContent = $(name).value; });
  $(name).addEventListener("change", () => { say({ do: "settings", [name]: Number($(name).value) }); $(name).blur(); });
}

// ---------------------------------------------------------------- clocks
function drawn(now) { tick(now); requestAnimationFrame(drawn); }
requestAnimationFrame(drawn);
setInterval(() => { if (game) ask(performance.now()); }, 4);
setInterval(sendControls, 400);  // says that the page is there
setInterval(showFigures, 250);
connect();
