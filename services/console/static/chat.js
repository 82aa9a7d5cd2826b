// Shows an answer as it is sampled. Without this script the form brings the whole answer with the next page.
const form = document.querySelector(".chat-form");
const list = document.querySelector(".chat");

function add(role, text) {
  const one = document.createElement("li");
  one.className = `said-by ${role}`;
  one.dataset.item = "";
  one.tabIndex = -1;
  const head = document.createElement("h3");
  head.textContent = role;
  const body = document.createElement("pre");
  body.className = "text";
  body.textContent = text;
  one.append(head, body);
  list.append(one);
  return { one, head, body };
}

function fail(message) {
  const shown = document.createElement("p");
  shown.className = "error";
  shown.setAttribute("role", "alert");
  shown.textContent = message;
  form.before(shown);
}

// The lines of an answer, each an object.
async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}

async function say() {
  const text = form.elements.text;
  const answer = await fetch("/chat/stream", { method: "POST", body: new URLSearchParams(new FormData(form)) });
  if (!answer.ok) { form.submit(); return; } // its page says what is wrong
  for (const old of document.querySelectorAll(".error")) old.remove();
  const asked = add("user", text.value);
  const said = add("assistant", "");
  let end = null;
  try {
    for await (const line of linesOf(answer)) {
      if (line.text) { said.body.textContent += line.text; said.one.scrollIntoView({ block: "nearest" }); } else end = line;
    }
  } catch { end = null; } // the connection broke
  if (!end?.history) { asked.one.remove(); said.one.remove(); fail(end?.error ?? "The answer broke off. Send the message again."); return; }
  const note = document.createElement("span");
  note.className = "facts";
  note.textContent = end.note;
  said.head.append(" ", note);
  form.elements.history.value = end.history;
  form.querySelector("details").open = false;
  text.value = "";
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  if (button.disabled) return;
  button.disabled = true;
  try { await say(); } catch { fail("The console does not answer. Does `mulligan ui` run?"); }
  button.disabled = false;
  form.elements.text.focus();
});
