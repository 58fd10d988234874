// Receives webhooks, and takes only those that are signed with SIGN_KEY. Node 18 or newer, nothing to install.
//
//     SIGN_KEY=... node receiver.mjs 8080

import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const KEY = process.env.SIGN_KEY;
if (!KEY) throw new Error("set SIGN_KEY");
const TOLERANCE = 300; // seconds: an older one may have been recorded and be sent once more by somebody else

const seen = new Set(); // ids; in a service of several processes: a table with a unique column

// The event, or an error. `body` is a Buffer, as it came: JSON that is written again has other bytes.
function verify(headers, body, now = Date.now() / 1000) {
  const id = headers["x-webhook-id"] ?? "";
  const parts = Object.fromEntries((headers["x-signature"] ?? "").split(",").map((part) => part.split("=")));
  const expected = createHmac("sha256", KEY).update(`${parts.t}.${id}.`).update(body).digest();
  const given = Buffer.from(parts.v1 ?? "", "hex");
  if (given.length !== expected.length || !timingSafeEqual(given, expected)) throw new Error("wrong signature");
  if (!(Math.abs(now - Number(parts.t)) <= TOLERANCE)) throw new Error("too old");
  return JSON.parse(body.toString("utf8"));
}

// Handle one, but for one that has come before: the sender repeats it when an answer was lost.
async function take(id, event) {
  if (seen.has(id)) return;
  seen.add(id);
  if (seen.size > 100_000) seen.delete(seen.values().next().value);
  try {
    await handle(event);
  } catch (fault) {
    seen.delete(id); // the sender tries it again, and then it is to be handled
    throw fault;
  }
}

// What you do with it. Be quick, or put it in a queue: the next event of the job waits for your answer.
async function handle(event) {
  console.log(JSON.stringify(event));
}

createServer(async (request, response) => {
  let event;
  try {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk); // an error where the connection is cut
    event = verify(request.headers, Buffer.concat(chunks));
  } catch (fault) {
    return response.writeHead(401).end(fault.message);
  }
  try {
    await take(request.headers["x-webhook-id"], event);
    response.writeHead(200).end("ok");
  } catch (fault) {
    console.error(fault);
    response.writeHead(500).end("try again");
  }
}).listen(Number(process.argv[2]), "127.0.0.1");
