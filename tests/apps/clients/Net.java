// Net.java serve ADDRESS PORT | talk ADDRESS PORT MIB: at PORT an echo with blocking sockets, at PORT + 1 one with a Selector,
// at PORT + 2 an HttpServer; and clients of all three: Socket, SocketChannel, HttpClient.
import com.sun.net.httpserver.HttpServer;
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.util.*;
import java.util.concurrent.*;

public class Net {
  static byte[] pattern(int size, int seed) {
    byte[] bytes = new byte[size];
    new Random(seed).nextBytes(bytes);
    return bytes;
  }

  static void blocking(InetSocketAddress at) throws Exception {
    ServerSocket listener = new ServerSocket();
    listener.bind(at);
    new Thread(() -> {
      while (true) {
        try {
          Socket link = listener.accept();
          new Thread(() -> {
            try (link) {
              link.getInputStream().transferTo(link.getOutputStream());
            } catch (IOException error) {
              error.printStackTrace();
            }
          }).start();
        } catch (IOException error) {
          return;
        }
      }
    }).start();
  }

  static void selecting(InetSocketAddress at) throws Exception {
    Selector selector = Selector.open();
    ServerSocketChannel listener = ServerSocketChannel.open().bind(at);
    listener.configureBlocking(false);
    listener.register(selector, SelectionKey.OP_ACCEPT);
    new Thread(() -> {
      try {
        while (true) {
          selector.select();
          for (SelectionKey key : selector.selectedKeys()) {
            if (key.isAcceptable()) {
              SocketChannel link = listener.accept();
              link.configureBlocking(false);
              link.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(65536));
              continue;
            }
            SocketChannel link = (SocketChannel) key.channel();
            ByteBuffer buffer = (ByteBuffer) key.attachment();
            boolean ended = key.isReadable() && link.read(buffer) < 0;
            buffer.flip();
            link.write(buffer);
            boolean left = buffer.hasRemaining();
            buffer.compact();
            if (ended && !left) {
              link.close();
            } else {
              key.interestOps((left ? SelectionKey.OP_WRITE : 0) | (buffer.hasRemaining() && !ended ? SelectionKey.OP_READ : 0));
            }
          }
          selector.selectedKeys().clear();
        }
      } catch (IOException error) {
        error.printStackTrace();
      }
    }).start();
  }

  static void http(InetSocketAddress at) throws Exception {
    HttpServer server = HttpServer.create(at, 0);
    server.setExecutor(Executors.newFixedThreadPool(4));
    server.createContext("/", exchange -> {
      byte[] body = exchange.getRequestBody().readAllBytes();
      exchange.sendResponseHeaders(200, body.length);
      try (OutputStream out = exchange.getResponseBody()) {
        out.write(body);
      }
    });
    server.start();
  }

  static void check(String what, byte[] sent, byte[] got) {
    if (!Arrays.equals(sent, got)) throw new IllegalStateException(what + ": " + got.length + " bytes of " + sent.length + ", or not the same");
  }

  static void bySocket(InetSocketAddress at, byte[] sent) throws Exception {
    try (Socket link = new Socket(at.getAddress(), at.getPort())) {
      link.setTcpNoDelay(true);
      Thread writer = new Thread(() -> {
        try {
          link.getOutputStream().write(sent);
          link.shutdownOutput();
        } catch (IOException error) {
          error.printStackTrace();
        }
      });
      writer.start();
      check("Socket", sent, link.getInputStream().readAllBytes());
      writer.join();
    }
  }

  static void byChannel(InetSocketAddress at, byte[] sent) throws Exception {
    try (SocketChannel link = SocketChannel.open(); Selector selector = Selector.open()) {
      link.configureBlocking(false);
      if (!link.connect(at)) {
        link.register(selector, SelectionKey.OP_CONNECT);
        selector.select();
        link.finishConnect();
      }
      SelectionKey key = link.register(selector, SelectionKey.OP_READ | SelectionKey.OP_WRITE);
      ByteBuffer out = ByteBuffer.wrap(sent), in = ByteBuffer.allocate(sent.length + 1);
      while (true) {
        selector.select(20000);
        selector.selectedKeys().clear();
        if (out.hasRemaining()) {
          link.write(out);
          if (!out.hasRemaining()) {
            link.shutdownOutput();
            key.interestOps(SelectionKey.OP_READ);
          }
        }
        if (link.read(in) < 0) break;
      }
      check("SocketChannel", sent, Arrays.copyOf(in.array(), in.position()));
    }
  }

  static void talk(String address, int port, int mib) throws Exception {
    ExecutorService pool = Executors.newFixedThreadPool(8);
    List<Future<?>> work = new ArrayList<>();
    HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    for (int i = 0; i < 4; i++) {
      byte[] sent = pattern(mib << 20, i);
      work.add(pool.submit(() -> { bySocket(new InetSocketAddress(address, port), sent); return null; }));
      work.add(pool.submit(() -> { byChannel(new InetSocketAddress(address, port + 1), sent); return null; }));
    }
    for (Future<?> each : work) each.get();
    URI uri = URI.create("http://" + (address.contains(":") ? "[" + address + "]" : address) + ":" + (port + 2) + "/");
    for (int i = 0; i < 50; i++) {
      byte[] sent = pattern(i * 20000, i);
      HttpRequest request = HttpRequest.newBuilder(uri).POST(HttpRequest.BodyPublishers.ofByteArray(sent)).build();
      check("HttpClient", sent, client.send(request, HttpResponse.BodyHandlers.ofByteArray()).body());
    }
    pool.shutdown();
    System.out.println("every byte came back");
  }

  public static void main(String[] args) throws Exception {
    int port = Integer.parseInt(args[2]);
    if (args[0].equals("talk")) {
      talk(args[1], port, Integer.parseInt(args[3]));
      System.exit(0); // HttpClient's threads stay for a while
    }
    blocking(new InetSocketAddress(args[1], port));
    selecting(new InetSocketAddress(args[1], port + 1));
    http(new InetSocketAddress(args[1], port + 2));
  }
}
