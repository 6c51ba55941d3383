// node_http.js serve ADDRESS PORT HOW | talk ADDRESS PORT MIB. HOW: one process; or two workers of a cluster, which accept
// themselves (accept) or are given connections by the primary (passed).
'use strict';
const cluster = require('cluster'), crypto = require('crypto'), http = require('http'), stream = require('stream');
const [what, address, port, last] = process.argv.slice(2);
const block = Buffer.alloc(1 << 20, i => 0).map((_, i) => (i * 7919 >> 3) & 255);

function answer(request, reply) {
  if (request.method === 'POST') return request.pipe(reply);
  stream.pipeline(stream.Readable.from((function* () { for (let i = 0; i < Number(request.url.slice(1)); i++) yield block; })()), reply,
    error => error && console.error(error));
}

function serve() {
  process.on('SIGTERM', () => {
    for (const worker of Object.values(cluster.workers || {})) worker.process.kill();
    process.exit(0);
  });
  if (last !== 'one' && cluster.isPrimary) {
    cluster.schedulingPolicy = last === 'accept' ? cluster.SCHED_NONE : cluster.SCHED_RR;
    for (let i = 0; i < 2; i++) cluster.fork();
  } else {
    http.createServer(answer).listen(Number(port), address);
  }
}

function ask(agent, method, path, body) {
  return new Promise((resolve, reject) => {
    const request = http.request({host: address, port, agent, method, path}, reply => {
      const hash = crypto.createHash('sha256');
      reply.on('data', data => hash.update(data)).on('end', () => resolve(hash.digest('hex'))).on('error', reject);
    }).on('error', reject);
    body ? stream.Readable.from(body).pipe(request) : request.end();
  });
}

async function talk() {
  const agent = new http.Agent({keepAlive: true, maxSockets: 4});
  const mib = Number(last), expected = crypto.createHash('sha256');
  const body = Array(mib).fill(block);
  body.forEach(each => expected.update(each));
  const digest = expected.digest('hex');
  const work = [];
  for (let i = 0; i < 8; i++) work.push(ask(agent, 'GET', `/${mib}`), ask(agent, 'POST', '/', body));
  const wrong = (await Promise.all(work)).filter(each => each !== digest).length;
  for (let i = 0; i < 200; i++) await ask(agent, 'POST', '/', [Buffer.from(`${i}`)]);
  console.log(`${wrong} of ${work.length} wrong`);
  agent.destroy();
}

what === 'serve' ? serve() : talk().catch(error => { console.error(error); process.exit(1); });
